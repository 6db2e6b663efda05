"""A leader's mailbox: what is held back until all leaders have it, and in which order it comes."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from support.replica_harness import FakeInbox

from waybill.engine.control.operations import FlushCache
from waybill.engine.ipc.frontend_messages import (
    AbortReq,
    ControlReq,
    FrontendMessage,
    GetInternalStateReq,
    SeqNotice,
)
from waybill.engine.scheduler.agreement import Agreement, Proposal
from waybill.engine.scheduler.mailbox import Mailbox

KINDS = st.sampled_from([SeqNotice, AbortReq, ControlReq, GetInternalStateReq])


@given(
    kinds=st.lists(KINDS, max_size=12), seen=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=12)
)
def test_the_mailbox_holds_operations_back_and_keeps_the_order(kinds: list[Any], seen: list[tuple[int, int]]) -> None:
    inbox = FakeInbox()
    mailbox = Mailbox(inbox)
    numbered = []
    for index, kind in enumerate(kinds):
        if kind is GetInternalStateReq:
            inbox.messages.append(kind(f"q{index}"))
        elif kind is ControlReq:
            numbered.append(kind(index + 1, "op", FlushCache()))
            inbox.messages.append(numbered[-1])
        else:
            numbered.append(kind(index + 1))
            inbox.messages.append(numbered[-1])
    mailbox.collect()
    assert mailbox.seen == max((message.seq for message in numbered), default=0)
    handled: list[FrontendMessage] = []
    for others_seen, others_applied in [*seen, (12, 12)]:
        own = Proposal(seen=mailbox.seen, applied=mailbox.applied)
        other = Proposal(seen=others_seen, applied=min(others_applied, others_seen))
        agreement = Agreement((own, other))
        for message in mailbox.due(agreement):
            handled.append(message)
            if isinstance(message, (AbortReq, ControlReq)):
                assert message.seq <= others_seen
            if isinstance(message, ControlReq):
                assert min(other.applied, own.applied) >= message.seq - 1
    questions = [message for message in handled if isinstance(message, GetInternalStateReq)]
    assert handled[: len(questions)] == questions, "a question waits for nothing"
    rest = handled[len(questions) :]
    assert rest == numbered[: len(rest)], "in order, none left out"
