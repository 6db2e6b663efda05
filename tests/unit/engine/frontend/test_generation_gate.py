"""Who may send a request while weights change, and what the frontend makes of replies that come late or never."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from waybill.engine.config import EngineConfig
from waybill.engine.control.blocked import Blocked, BlockedKind
from waybill.engine.control.operations import (
    DestroyWeightsUpdateGroup,
    ReleaseMemoryOccupation,
    UpdateWeightsFromDisk,
    UpdateWeightsFromDistributed,
)
from waybill.engine.frontend.dp_router import DpRouter
from waybill.engine.frontend.engine_controls import EngineControls
from waybill.engine.frontend.generation_gate import GenerationGate, NotDrainedError, UnavailableError
from waybill.engine.frontend.leader_link import LeaderLink
from waybill.engine.frontend.pending_replies import PendingReplies
from waybill.engine.frontend.waiting_requests import WaitingRequests
from waybill.engine.ipc.frontend_messages import AbortReq, ControlReply, ControlReq

OPEN = Blocked(BlockedKind.INCOMPLETE, "weights: an update is not complete: 1 of 2 tensors are still to come")
RELEASED = Blocked(BlockedKind.RELEASED, "memory is released")
TORN = Blocked(BlockedKind.TORN, "weights: a transfer was torn (x)")


class Running:
    """How many requests the engine has."""

    def __init__(self, count: int = 0) -> None:
        self.count = count

    def __call__(self) -> int:
        return self.count


async def waits(coroutine: Any) -> asyncio.Task[Any]:
    task = asyncio.ensure_future(coroutine)
    await asyncio.sleep(0.03)
    assert not task.done()
    return task


def test_requests_wait_while_it_is_closed() -> None:
    async def scenario() -> None:
        running = Running(1)
        gate = GenerationGate(5.0, running)
        await gate.enter()

        async def update() -> None:
            async with gate.closed(drain=True):
                assert running.count == 0
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(gate.enter(), 0.02)

        updating = await waits(update())
        waiting = await waits(gate.enter())
        running.count = 0
        await updating
        await waiting

    asyncio.run(scenario())


def test_an_open_update_lets_wait_and_a_torn_one_refuses() -> None:
    async def scenario() -> None:
        gate = GenerationGate(0.2, Running())
        async with gate.closed(drain=False):
            gate.blocked = OPEN
        waiting = await waits(gate.enter())
        async with gate.closed(drain=False):
            gate.blocked = None
        await waiting
        gate.blocked = OPEN
        waiting = await waits(gate.enter())
        gate.blocked = TORN
        for entering in (waiting, gate.enter()):
            with pytest.raises(UnavailableError, match="torn"):
                await entering
        gate.blocked = OPEN
        with pytest.raises(UnavailableError, match="not complete"):
            await gate.enter()

    asyncio.run(scenario())


def test_a_drain_ends_by_a_pause_in_vain_or_with_the_engine() -> None:
    async def scenario() -> None:
        gate = GenerationGate(0.2, Running(3))

        async def close() -> None:
            async with gate.closed(drain=True):
                pass

        with pytest.raises(NotDrainedError, match=r"3 requests still run after 0\.2 s"):
            await close()
        await gate.enter()
        closing = await waits(close())
        gate.is_paused = True
        await closing
        gate.is_paused = False
        closing, gate.blocked = await waits(close()), None
        waiting = await waits(gate.enter())
        gate.fail_all(RuntimeError("the engine is gone"))
        for task in (closing, waiting):
            with pytest.raises(RuntimeError, match="the engine is gone"):
                await task

    asyncio.run(scenario())


class FakeLeader:
    """Answers what `answer` makes of a message; None: never."""

    def __init__(self, replies: PendingReplies, answer: Callable[[Any], ControlReply | None]) -> None:
        self.messages: list[Any] = []
        self._replies, self._answer = replies, answer

    def send(self, message: Any) -> None:
        self.messages.append(message)
        reply = self._answer(message)
        if reply is not None:
            asyncio.get_running_loop().call_soon(self._replies.resolve, reply.op_id, reply)

    def flush_and_close(self, timeout_s: float) -> None: ...


def controls_with(
    answer: Callable[[Any], ControlReply | None], running: Running, timeout_s: float = 0.2
) -> tuple[EngineControls, GenerationGate, PendingReplies, FakeLeader]:
    replies = PendingReplies()
    leader = FakeLeader(replies, answer)
    gate = GenerationGate(timeout_s, running)
    config = EngineConfig(model_path="", weight_sync_timeout_s=timeout_s)
    controls = EngineControls(config, LeaderLink([leader]), replies, gate, DpRouter(1), WaitingRequests(gate))
    controls._transfer_timeout_s = timeout_s
    return controls, gate, replies, leader


def test_a_reply_that_comes_too_late_still_counts() -> None:
    """Nobody hears it, but whether the engine may generate follows from it."""

    async def scenario() -> None:
        controls, gate, replies, leader = controls_with(lambda message: None, Running())
        with pytest.raises(UnavailableError, match="has not ended within"):
            await controls.run(UpdateWeightsFromDisk("x"))
        with pytest.raises(UnavailableError, match="has not ended within"):
            await gate.enter()
        (message,) = leader.messages
        replies.resolve(message.op_id, ControlReply(message.op_id, False, "torn", blocked=TORN))
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError, match="torn"):
            await gate.enter()
        gate.blocked = None
        await gate.enter()

    asyncio.run(scenario())


def test_a_bucket_that_never_reached_the_engine_costs_its_group() -> None:
    """The trainer broadcasts already, to nobody."""

    async def scenario() -> None:
        controls, _, _, leader = controls_with(lambda message: ControlReply(message.op_id, True), Running(1))
        arguments = (["a"], ["float32"], [[1]])
        with pytest.raises(NotDrainedError):
            await controls.run(UpdateWeightsFromDistributed(*arguments, "g"))
        assert [message.operation for message in leader.messages] == [DestroyWeightsUpdateGroup("g")]
        with pytest.raises(ValueError, match="load_format='colour'"):
            await controls.run(UpdateWeightsFromDistributed(*arguments, load_format="colour"))
        assert len(leader.messages) == 1

    asyncio.run(scenario())


def test_abort_all_requests_comes_before_the_update() -> None:
    async def scenario() -> None:
        running = Running(2)

        def answer(message: Any) -> ControlReply | None:
            if isinstance(message, AbortReq):
                running.count = 0
                return None
            return ControlReply(message.op_id, True)

        controls, _, _, leader = controls_with(answer, running)
        assert (await controls.run(UpdateWeightsFromDisk("x", abort_all_requests=True))).success
        assert [type(message) for message in leader.messages] == [AbortReq, ControlReq]

    asyncio.run(scenario())


def test_nothing_comes_in_between_an_abort_and_the_release_of_memory() -> None:
    """A request that came in would have the release refused. No pause is left behind, which nobody would end."""

    async def scenario() -> None:
        controls, gate, replies, leader = controls_with(lambda message: None, Running(1), timeout_s=5.0)
        releasing = await waits(controls.release_memory(["kv_cache"], aborts=True))
        coming = await waits(gate.enter())
        abort, release = leader.messages
        assert isinstance(abort, AbortReq) and abort.abort_all
        assert release.operation == ReleaseMemoryOccupation(["kv_cache"])
        replies.resolve(release.op_id, ControlReply(release.op_id, True, blocked=RELEASED))
        assert (await releasing).success and not gate.is_paused
        with pytest.raises(UnavailableError, match="memory is released"):
            await coming

    asyncio.run(scenario())


def test_memory_is_released_behind_the_end_of_what_runs() -> None:
    async def scenario() -> None:
        running = Running(1)
        controls, _, _, leader = controls_with(lambda message: ControlReply(message.op_id, True), running, 5.0)
        releasing = await waits(controls.release_memory(None, aborts=False))
        assert not leader.messages
        running.count = 0
        assert (await releasing).success
        assert [message.operation for message in leader.messages] == [ReleaseMemoryOccupation()]

    asyncio.run(scenario())


@pytest.mark.parametrize("is_abortable", [False, True])
def test_nobody_comes_in_between_into_the_second_of_two_operations(is_abortable: bool) -> None:
    """The second waits for the first to end, and begins before who waited for the first has had its turn."""

    async def scenario() -> None:
        gate = GenerationGate(5.0, Running())
        under_way = asyncio.Event()
        waiting = WaitingRequests(gate)

        async def operate(seconds: float) -> None:
            async with gate.closed(drain=True):
                under_way.set()
                await asyncio.sleep(seconds)
                under_way.clear()

        async def request() -> None:
            await (waiting.enter(waiting.begin({"rid": None})) if is_abortable else gate.enter())
            assert not under_way.is_set()

        operations = [asyncio.ensure_future(operate(0.02)) for _ in range(3)]
        await under_way.wait()
        await asyncio.gather(*(request() for _ in range(3)), *operations)

    asyncio.run(scenario())
