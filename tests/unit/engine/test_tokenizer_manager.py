"""What the frontend does about callers that do not read."""

from __future__ import annotations

import asyncio
from pathlib import Path

import zmq

from waybill.engine.config import EngineConfig
from waybill.engine.io_struct import AbortReq, FrontendMessage, OutputBatch, RequestOutput
from waybill.engine.sockets import Receiver
from waybill.engine.tokenizer_manager import MAX_UNREAD_OUTPUTS, TokenizerManager


def output(rid: str) -> RequestOutput:
    return RequestOutput(
        rid=rid,
        text="",
        token_ids=[1],
        prompt_tokens=1,
        completion_tokens=1,
        cached_tokens=0,
        num_retractions=0,
        weight_version="v",
        dp_rank=0,
    )


def test_all_samples_of_a_request_that_nobody_reads_are_aborted_and_no_other(tmp_path: Path) -> None:
    async def run() -> set[str]:
        context = zmq.Context()
        leader: Receiver[FrontendMessage] = Receiver(context, f"ipc://{tmp_path}/leader", FrontendMessage)
        manager = TokenizerManager(
            EngineConfig(model_path="m"),
            None,
            leaders=[f"ipc://{tmp_path}/leader"],
            frontend=f"ipc://{tmp_path}/frontend",
            queries=[f"ipc://{tmp_path}/queries"],
        )
        unread: asyncio.Queue[object] = asyncio.Queue()
        manager._events = {"a": unread, "ab": unread, "other": asyncio.Queue()}  # type: ignore[dict-item]
        step = OutputBatch([output("a"), output("ab"), output("other")])
        for _ in range(MAX_UNREAD_OUTPUTS - 1):
            manager._deliver(step, [])
            manager._events["other"].get_nowait()
        assert not leader.wait(0.05), "not yet"
        manager._deliver(step, [])
        aborted = set()
        while leader.wait(0.2):
            message = leader.receive_nowait()
            assert isinstance(message, AbortReq) and message.exact
            aborted.add(message.rid)
        manager.close()
        leader.close()
        context.term()
        return aborted

    assert asyncio.run(run()) == {"a", "ab"}
