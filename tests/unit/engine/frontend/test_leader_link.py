"""One sequence of numbers, of which every leader sees every one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from support.replica_harness import FakeSender

from waybill.engine.frontend.leader_link import LeaderLink
from waybill.engine.io_struct import SamplingParams
from waybill.engine.ipc.frontend_messages import AbortReq, GetInternalStateReq, SeqNotice, TokenizedGenerateReqInput


@given(st.lists(st.tuples(st.sampled_from(["send", "all", "ask"]), st.integers(0, 2)), max_size=20))
def test_every_leader_gets_every_number_in_order_and_a_request_once(calls: list[tuple[str, int]]) -> None:
    leaders = [FakeSender() for _ in range(3)]
    link = LeaderLink(leaders)
    for index, (kind, rank) in enumerate(calls):
        if kind == "send":
            link.send(rank, lambda number, i=index: TokenizedGenerateReqInput(number, f"r{i}", b"", SamplingParams()))
        elif kind == "all":
            link.send_to_all(lambda number, i=index: AbortReq(number, rid=f"a{i}"))
        else:
            link.ask(rank, GetInternalStateReq(f"q{index}"))
    num_numbered = sum(kind != "ask" for kind, _ in calls)
    for rank, leader in enumerate(leaders):
        numbered = [message for message in leader.sent if not isinstance(message, GetInternalStateReq)]
        assert [message.seq for message in numbered] == list(range(1, num_numbered + 1))
        requests = [message.rid for message in numbered if isinstance(message, TokenizedGenerateReqInput)]
        assert requests == [f"r{i}" for i, call in enumerate(calls) if call == ("send", rank)]
        aborts = [message.rid for message in numbered if isinstance(message, AbortReq)]
        assert aborts == [f"a{i}" for i, (kind, _) in enumerate(calls) if kind == "all"]
        notices = [message for message in numbered if isinstance(message, SeqNotice)]
        assert len(notices) == num_numbered - len(requests) - len(aborts)
        questions = [message.op_id for message in leader.sent if isinstance(message, GetInternalStateReq)]
        assert questions == [f"q{i}" for i, call in enumerate(calls) if call == ("ask", rank)]
