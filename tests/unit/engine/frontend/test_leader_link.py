"""One sequence of numbers, of which every leader sees every one."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from support.replica_harness import FakeSender

from waybill.engine.frontend.engine_state import merge_states
from waybill.engine.frontend.leader_link import LeaderLink
from waybill.engine.io_struct import SamplingParams
from waybill.engine.ipc.frontend_messages import (
    AbortReq,
    ControlReply,
    GetInternalStateReq,
    SeqNotice,
    SyncWait,
    TokenizedGenerateReqInput,
)


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


def test_the_state_of_an_engine_adds_up_but_for_what_does_not() -> None:
    def reply(sync_waits: list[SyncWait], **state: Any) -> ControlReply:
        return ControlReply("op", True, state=state, sync_waits=sync_waits)

    first = {"num_running": 2, "num_steps": 7, "finish_max_s": 0.5, "finish_total_s": 1.0, "weight_version": "v1"}
    second = {"num_running": 3, "num_steps": 7, "finish_max_s": 0.25, "finish_total_s": 2.0, "weight_version": "v1"}
    merged = merge_states(
        [reply([SyncWait(1, "prefill", 1.5, 2)], **first), reply([SyncWait(0, "decode", 0.5, 1)], **second)]
    )
    assert merged == {
        "num_running": 5,
        "num_steps": 7,
        "finish_max_s": 0.5,
        "finish_total_s": 3.0,
        "weight_version": "v1",
        "dp_ranks": [first, second],
        "sync_waits": [
            {"rank": 0, "straggler": 1, "cause": "prefill", "seconds": 1.5, "num_steps": 2},
            {"rank": 1, "straggler": 0, "cause": "decode", "seconds": 0.5, "num_steps": 1},
        ],
    }
