"""Requests that wait while weights change: an abort reaches them, and nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from waybill.engine.config import EngineConfig
from waybill.engine.control.blocked import Blocked, BlockedKind
from waybill.engine.control.operations import PAUSE_MODES, PauseGeneration
from waybill.engine.frontend.generate_request import parse_generate_request
from waybill.engine.frontend.generation_gate import UnavailableError
from waybill.engine.frontend.tokenizer_manager import TokenizerManager
from waybill.engine.ipc.frontend_messages import ControlReply, FrontendMessage, TokenizedGenerateReqInput
from waybill.engine.ipc.sockets import Receiver

WAIT_S = 20.0
FACTS = {"context_length": 100, "kv_cache_tokens": 100, "vocab_size": 100, "num_layers": 1}
OPEN_UPDATE = Blocked(BlockedKind.INCOMPLETE, "weights: an update is not complete")


class Wiring:
    """A manager whose engine takes weights, and the socket of the engine's leader."""

    def __init__(self, folder: Path, context: zmq.Context[Any]) -> None:
        self.leader: Receiver[FrontendMessage] = Receiver(context, f"ipc://{folder}/leader", FrontendMessage)
        self.outputs = context.socket(zmq.PUSH)
        self.outputs.connect(f"ipc://{folder}/frontend")
        self.manager = TokenizerManager(
            EngineConfig(model_path="m", enable_return_routed_experts=True),
            None,
            leaders=[f"ipc://{folder}/leader"],
            frontend=f"ipc://{folder}/frontend",
            queries=[f"ipc://{folder}/queries"],
        )

    def ask(self, **fields: Any) -> asyncio.Task[Any]:
        async def first() -> Any:
            return await anext(self.manager.generate(parse_generate_request({"input_ids": [1, 2], **fields})))

        return asyncio.create_task(first())

    async def sent(self, num: int) -> list[str]:
        """The rids of so many requests that the leader gets, and of no more."""
        found: list[str] = []
        while len(found) < num:
            await asyncio.sleep(0.01)
            found += self._arrived()
        await asyncio.sleep(0.1)
        return found + self._arrived()

    def _arrived(self) -> list[str]:
        found = []
        while (message := self.leader.receive_nowait()) is not None:
            if isinstance(message, TokenizedGenerateReqInput):
                found.append(message.rid)
        return found


def during_an_update(folder: Path, check: Callable[[Wiring], Awaitable[None]]) -> None:
    async def run() -> None:
        context = zmq.Context()
        wiring = Wiring(folder, context)
        wiring.outputs.send(msgspec.msgpack.encode(ControlReply("ready", True, state=FACTS)))
        await wiring.manager.start(WAIT_S)
        wiring.manager._gate.blocked = OPEN_UPDATE
        try:
            async with asyncio.timeout(WAIT_S):
                await check(wiring)
        finally:
            wiring.manager.close()
            wiring.leader.close()
            context.destroy(linger=0)

    asyncio.run(run())


async def all_wait(*tasks: asyncio.Task[Any]) -> None:
    await asyncio.sleep(0.1)
    assert not any(task.done() for task in tasks)


@pytest.mark.parametrize("form", ["int32", "compact"])
def test_an_aborted_one_answers_at_once_and_the_engine_never_sees_it(tmp_path: Path, form: str) -> None:
    async def check(wiring: Wiring) -> None:
        routes = {"return_routed_experts": True, "routed_experts_format": form}
        told, kept = wiring.ask(rid="told", **routes), wiring.ask(rid="kept")
        await all_wait(told, kept)
        wiring.manager.abort_request("to", message="enough")
        meta = (await told)["meta_info"]
        assert meta["finish_reason"] == {"type": "abort", "message": "enough"}
        assert (meta["prompt_tokens"], meta["completion_tokens"], meta["weight_version"]) == (2, 0, "default")
        # Without a key in the dialect's form, as of any request that is aborted before its first token.
        reason = "the request was aborted before the engine had it"
        assert meta.get("routed_experts_error") == (reason if form == "compact" else None)
        assert ("routed_experts" in meta) == (form == "compact")
        await all_wait(kept)
        # Its name is free again, and it holds no place.
        again = wiring.ask(rid="told")
        await all_wait(again)
        assert wiring.manager.num_unfinished == 2
        wiring.manager._gate.blocked = None
        assert await wiring.sent(2) == ["kept", "told"]
        kept.cancel()
        again.cancel()

    during_an_update(tmp_path, check)


def test_of_a_batch_the_others_go_on(tmp_path: Path) -> None:
    async def check(wiring: Wiring) -> None:
        batch = wiring.ask(input_ids=[[1], [2], [3]], rid=["a", "b", "ab"], stream=True)
        await all_wait(batch)
        assert await wiring.manager.abort_exactly(["a", "nobody"]) == 1
        await all_wait(batch)
        wiring.manager._gate.blocked = None
        assert (await batch)["meta_info"]["id"] == "a"
        assert await wiring.sent(2) == ["b", "ab"]

    during_an_update(tmp_path, check)


@pytest.mark.parametrize("num_samples", [1, 3])
def test_all_of_a_request_with_samples(tmp_path: Path, num_samples: int) -> None:
    async def check(wiring: Wiring) -> None:
        asked = wiring.ask(rid="one", sampling_params={"n": num_samples})
        other = wiring.ask(rid="one_0x")
        await all_wait(asked, other)
        assert await wiring.manager.abort_exactly(["one"]) == num_samples
        answers = await asked
        for answer in answers if num_samples > 1 else [answers]:
            assert answer["meta_info"]["finish_reason"] == {"type": "abort", "message": "aborted by request"}
        await all_wait(other)
        assert await wiring.manager.abort_exactly(None) == 1
        assert (await other)["meta_info"]["finish_reason"]["type"] == "abort"
        assert await wiring.sent(0) == []

    during_an_update(tmp_path, check)


def test_a_refusal_reaches_who_waits(tmp_path: Path) -> None:
    async def check(wiring: Wiring) -> None:
        asked = wiring.ask(rid="one")
        await all_wait(asked)
        wiring.manager._gate.blocked = Blocked(BlockedKind.TORN, "weights: a transfer was torn")
        with pytest.raises(UnavailableError, match="torn"):
            await asked
        assert wiring.manager.num_unfinished == 0

    during_an_update(tmp_path, check)


@pytest.mark.parametrize("mode", PAUSE_MODES)
def test_a_pause_that_ends_requests_ends_these_too(tmp_path: Path, mode: str) -> None:
    async def check(wiring: Wiring) -> None:
        asked = wiring.ask(rid="one")
        await all_wait(asked)
        pause = asyncio.create_task(wiring.manager.controls.run(PauseGeneration(mode)))
        await asyncio.sleep(0.1)
        pause.cancel()
        assert asked.done() == (mode == "abort")
        if mode == "abort":
            reason = (await asked)["meta_info"]["finish_reason"]
            assert reason == {"type": "abort", "message": "aborted by a pause"}
        asked.cancel()

    during_an_update(tmp_path, check)
