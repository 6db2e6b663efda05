"""The frontend's half of control operations: pauses, weight updates, update groups, memory, the prefix cache.

Each is sent to every leader under one number, takes effect at one step on all ranks, and is answered once.
"""

from __future__ import annotations

import asyncio
import uuid
from contextlib import ExitStack

import msgspec

from ..config import EngineConfig
from ..control.blocked import Blocked, BlockedKind
from ..control.operations import (
    ContinueGeneration,
    ControlOperation,
    DestroyWeightsUpdateGroup,
    InitWeightsUpdateGroup,
    MemoryOperation,
    PauseGeneration,
    ReleaseMemoryOccupation,
    ResumeMemoryOccupation,
    UpdateWeightsFromDisk,
    UpdateWeightsFromDistributed,
    UpdateWeightsFromTensor,
    UpdateWeightVersion,
    WeightUpdate,
)
from ..ipc.frontend_messages import ABORTED_BY_PAUSE, AbortReq, ControlReply, ControlReq, NumberedMessage
from ..validation.host_names import check_address
from ..weight_sync.memory_file import memory_file, write_all
from .dp_router import DpRouter
from .generation_gate import GenerationGate, NotDrainedError, UnavailableError
from .leader_link import LeaderLink
from .pending_replies import PendingReplies
from .waiting_requests import WaitingRequests

CONTROL_TIMEOUT_S = 30.0
# Joining and transfers are bounded by the ranks; the answer takes a little longer.
ANSWER_MARGIN_S = 10.0

AnyWeightUpdate = UpdateWeightsFromDisk | UpdateWeightsFromTensor | UpdateWeightsFromDistributed
# What may leave the engine unable to generate.
BlockingOperation = AnyWeightUpdate | ReleaseMemoryOccupation | ResumeMemoryOccupation


class StorageError(RuntimeError):
    """The host has no room for what a caller sent; the message says where."""


class EngineControls:
    """Has operations done by the engine."""

    def __init__(
        self,
        config: EngineConfig,
        link: LeaderLink,
        replies: PendingReplies,
        gate: GenerationGate,
        dp_router: DpRouter,
        waiting: WaitingRequests,
    ) -> None:
        self._waiting = waiting
        self._link = link
        self._replies = replies
        self._gate = gate
        self._dp_router = dp_router
        self._trainer_hosts = config.weight_sync_hosts
        self._num_under_way = 0
        # Of the engine, as it said last.
        self.weight_version = config.weight_version
        self._transfer_timeout_s = config.weight_sync_timeout_s + ANSWER_MARGIN_S

    @property
    def is_under_way(self) -> bool:
        """Whether the leaders have been told of an operation and have not answered, in the time that it has."""
        return self._num_under_way > 0

    async def run(self, operation: ControlOperation) -> ControlReply:
        """The first leader's reply: whether it was done, and in which words. That a group has come together is told by rank
        0, and steps go on meanwhile.

        Raises:
            ValueError: the operation cannot be done, or the trainer's address is none that weights may come from.
            UnavailableError: what runs did not end in time, or the engine has not answered in time.
            StorageError: there is no room for the tensors that it holds.
        """
        operation.check()
        if isinstance(operation, UpdateWeightsFromTensor) and operation.safetensors is not None:
            return await self._update_from_bytes(operation)
        if isinstance(operation, WeightUpdate):
            return await self._update(operation)
        if isinstance(operation, PauseGeneration) and operation.mode == "abort":
            self._waiting.abort(lambda *_: True, ABORTED_BY_PAUSE)
        if isinstance(operation, UpdateWeightVersion) and operation.abort_all_requests:
            self._link.send_to_all(abort_everything)
        if isinstance(operation, MemoryOperation):
            async with self._gate.closed(drain=False):
                return await self._send_and_block(operation)
        if isinstance(operation, InitWeightsUpdateGroup):
            check_address(operation.master_address, self._trainer_hosts)
        return await self._send(operation)

    async def pause_when_idle(self) -> ControlReply:
        """Pause behind the end of what runs; what comes meanwhile waits.

        Raises:
            NotDrainedError: it did not end in time.
        """
        async with self._gate.closed(drain=True):
            return await self._send(PauseGeneration("in_place"))

    async def release_memory(self, tags: list[str] | None, *, aborts: bool) -> ControlReply:
        """Release memory when nothing runs, which is aborted or comes to its end; nothing comes in between.

        Raises:
            NotDrainedError: it did not end in time.
        """
        async with self._gate.closed(drain=not aborts):
            if aborts:
                self._link.send_to_all(abort_everything)
            return await self._send_and_block(ReleaseMemoryOccupation(tags))

    async def _send(self, operation: ControlOperation) -> ControlReply:
        op_id = uuid.uuid4().hex
        future = self._replies.expect(op_id)

        def on_done(done: asyncio.Future[ControlReply]) -> None:
            # Also when it comes too late for the caller: the engine has done it then.
            if not done.cancelled() and done.exception() is None:
                self._note(operation, done.result())

        future.add_done_callback(on_done)
        self._link.send_to_all(lambda number: ControlReq(number, op_id, operation))
        self._num_under_way += 1
        try:
            timeout_s = self._transfer_timeout_s if operation.is_long else CONTROL_TIMEOUT_S
            reply: ControlReply = await asyncio.wait_for(asyncio.shield(future), timeout_s)
        finally:
            self._num_under_way -= 1
        return reply

    def _note(self, operation: ControlOperation, reply: ControlReply) -> None:
        """What a frontend keeps of how the engine stands."""
        if reply.weight_version is not None:
            self.weight_version = reply.weight_version
        if isinstance(operation, BlockingOperation):
            self._gate.blocked = reply.blocked
        if not reply.success:
            return
        if isinstance(operation, PauseGeneration):
            self._gate.is_paused = True
        if isinstance(operation, ContinueGeneration):
            self._gate.is_paused = False
        if operation.empties_cache:
            self._dp_router.forget_prefixes()

    async def _send_and_block(self, operation: BlockingOperation) -> ControlReply:
        try:
            return await self._send(operation)
        except TimeoutError:
            message = f"weights: an operation has not ended within {self._transfer_timeout_s} s"
            self._gate.blocked = Blocked(BlockedKind.UNANSWERED, message)
            raise UnavailableError(message) from None

    async def _update(self, operation: AnyWeightUpdate) -> ControlReply:
        """Unless the engine is paused, what runs comes to its end first, and nothing new comes in."""
        if operation.abort_all_requests:
            self._link.send_to_all(abort_everything)
        try:
            async with self._gate.closed(drain=True):
                return await self._send_and_block(operation)
        except NotDrainedError:
            if isinstance(operation, UpdateWeightsFromDistributed):
                # The trainer broadcasts already, to nobody: what it sends must not be taken for a later bucket.
                await self._send(DestroyWeightsUpdateGroup(operation.group_name))
            raise

    async def _update_from_bytes(self, operation: UpdateWeightsFromTensor) -> ControlReply:
        """Through a file in shared memory; the ranks must run on this host."""
        data = await asyncio.to_thread(operation.data)
        with ExitStack() as stack:
            try:
                descriptor, path = stack.enter_context(memory_file())
                await asyncio.to_thread(write_all, descriptor, data)
            except OSError as error:
                raise StorageError(
                    f"safetensors: {len(data)} bytes cannot be written to memory: {error.strerror}"
                ) from error
            return await self._update(msgspec.structs.replace(operation, path=path, safetensors=None))


def abort_everything(number: int) -> NumberedMessage:
    return AbortReq(number, abort_all=True)
