"""What the leaders and the output processors answer, put together."""

from __future__ import annotations

from typing import Any

from waybill.engine.frontend.engine_queries import merge_states
from waybill.engine.ipc.frontend_messages import ControlReply, SyncWait


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
