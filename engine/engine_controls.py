"""The frontend's half of control operations: pauses, weight updates, update groups, memory, the prefix cache.

Each is sent to every leader under one number, takes effect at one step on all ranks, and is answered once.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import msgspec

from .config import EngineConfig
from .dp_router import DpRouter
from .generation_gate import GenerationGate, NotDrainedError, UnavailableError
from .io_struct import (
    AbortReq,
    ChecksumWeightsReq,
    ContinueGenerationReq,
    ControlReply,
    DestroyWeightsGroupReq,
    FlushCacheReq,
    GetWeightsReq,
    Hold,
    HoldKind,
    InitWeightsGroupReq,
    LoadWeightsReq,
    NumberedMessage,
    PauseGenerationReq,
    ReceiveWeightsReq,
    ReleaseMemoryReq,
    ResumeMemoryReq,
    WeightOptions,
)
from .leader_link import LeaderLink
from .reply_box import ReplyBox
from .weight_sync.manifest import LOAD_FORMATS
from .weight_sync.memory_file import memory_file, write_all
from .weight_sync.trainer_store import check_address

CONTROL_TIMEOUT_S = 30.0
# Joining and transfers are bounded by the ranks; the answer takes a little longer.
ANSWER_MARGIN_S = 10.0
PAUSE_MODES = ("abort", "retract", "in_place")
MEMORY_TAGS = ("weights", "kv_cache")


class StorageError(RuntimeError):
    """The host has no room for what a caller sent; the message says where."""


class EngineControls:
    """Every method returns the leader's reply: whether it was done, and in which words."""

    def __init__(
        self, config: EngineConfig, link: LeaderLink, replies: ReplyBox, gate: GenerationGate, dp_router: DpRouter
    ) -> None:
        self._link = link
        self._replies = replies
        self._gate = gate
        self._dp_router = dp_router
        self._trainer_hosts = config.weight_sync_hosts
        self._num_under_way = 0
        self._transfer_timeout_s = config.weight_sync_timeout_s + ANSWER_MARGIN_S

    @property
    def is_under_way(self) -> bool:
        """Whether the leaders have been told of an operation and have not answered, in the time that it has."""
        return self._num_under_way > 0

    async def _send(
        self,
        make: Callable[[int, str], NumberedMessage],
        timeout_s: float = CONTROL_TIMEOUT_S,
        note: Callable[[ControlReply], None] | None = None,
    ) -> ControlReply:
        """`note` hears the reply also when it comes too late for the caller: the engine has done it then."""
        op_id = uuid.uuid4().hex
        future = self._replies.expect(op_id)

        def on_done(done: asyncio.Future[ControlReply]) -> None:
            if note is not None and not done.cancelled() and done.exception() is None:
                note(done.result())

        future.add_done_callback(on_done)
        self._link.send_to_all(lambda number: make(number, op_id))
        self._num_under_way += 1
        try:
            reply: ControlReply = await asyncio.wait_for(asyncio.shield(future), timeout_s)
        finally:
            self._num_under_way -= 1
        return reply

    async def _send_and_hold(self, make: Callable[[int, str], NumberedMessage]) -> ControlReply:
        """For what may leave the engine unable to generate. A reply that comes too late for the caller still counts."""
        try:
            return await self._send(make, self._transfer_timeout_s, self._note_hold)
        except TimeoutError:
            message = f"weights: an operation has not ended within {self._transfer_timeout_s} s"
            self._gate.hold = Hold(HoldKind.UNANSWERED, message)
            raise UnavailableError(message) from None

    def _note_hold(self, reply: ControlReply) -> None:
        self._gate.hold = reply.hold

    def _note_pause(self, reply: ControlReply) -> None:
        self._gate.is_paused = self._gate.is_paused or reply.success

    def _note_continue(self, reply: ControlReply) -> None:
        self._gate.is_paused = self._gate.is_paused and not reply.success

    # --- generation -------------------------------------------------------------------------------------------------

    async def flush_cache(self) -> ControlReply:
        """Empty the prefix cache; only when nothing runs. What waits, or was paused with "retract", holds no pages."""
        reply = await self._send(FlushCacheReq)
        if reply.success:
            self._dp_router.forget_prefixes()
        return reply

    async def pause_generation(self, mode: str = "abort") -> ControlReply:
        """
        Raises:
            ValueError: `mode` is none of `PAUSE_MODES`.
        """
        if mode not in PAUSE_MODES:
            raise ValueError(f"mode={mode!r}: must be one of {', '.join(PAUSE_MODES)}")
        return await self._send(lambda number, op_id: PauseGenerationReq(number, op_id, mode), note=self._note_pause)

    async def continue_generation(self) -> ControlReply:
        return await self._send(ContinueGenerationReq, note=self._note_continue)

    # --- weights ----------------------------------------------------------------------------------------------------

    async def update_weights_from_disk(
        self,
        model_path: str,
        *,
        flush_cache: bool = True,
        weight_version: str | None = None,
        abort_all_requests: bool = False,
    ) -> ControlReply:
        """All weights, from a checkpoint folder that every rank can open."""
        options = WeightOptions(flush_cache, weight_version)
        return await self._update(
            lambda number, op_id: LoadWeightsReq(number, op_id, model_path, True, options), options, abort_all_requests
        )

    async def update_weights_from_file(
        self, path: str, options: WeightOptions, *, abort_all_requests: bool = False
    ) -> ControlReply:
        """Some tensors or all, from one safetensors file that every rank can open; shared memory is such a place."""
        return await self._update(
            lambda number, op_id: LoadWeightsReq(number, op_id, path, False, options), options, abort_all_requests
        )

    async def update_weights_from_bytes(
        self, data: bytes, options: WeightOptions, *, abort_all_requests: bool = False
    ) -> ControlReply:
        """As `update_weights_from_file`, with the file's bytes; the ranks must run on this host.

        Raises:
            StorageError: there is no room for the file.
        """
        with ExitStack() as stack:
            try:
                descriptor, path = stack.enter_context(memory_file())
                await asyncio.to_thread(write_all, descriptor, data)
            except OSError as error:
                raise StorageError(
                    f"safetensors: {len(data)} bytes cannot be written to memory: {error.strerror}"
                ) from error
            return await self.update_weights_from_file(path, options, abort_all_requests=abort_all_requests)

    async def init_weights_update_group(
        self,
        *,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str,
        backend: str,
    ) -> ControlReply:
        """Answered when rank 0 of the engine has joined; steps go on meanwhile.

        Raises:
            ValueError: `master_address` is no host, or none that weights may come from.
        """
        check_address(master_address, self._trainer_hosts)
        return await self._send(
            lambda number, op_id: InitWeightsGroupReq(
                number, op_id, master_address, master_port, rank_offset, world_size, group_name, backend
            ),
            self._transfer_timeout_s,
        )

    async def destroy_weights_update_group(self, group_name: str) -> ControlReply:
        return await self._send(lambda number, op_id: DestroyWeightsGroupReq(number, op_id, group_name))

    async def update_weights_from_distributed(
        self,
        names: list[str],
        dtypes: list[str],
        shapes: list[list[int]],
        *,
        group_name: str,
        options: WeightOptions,
        load_format: str | None = None,
        abort_all_requests: bool = False,
    ) -> ControlReply:
        """Some tensors or all, broadcast by the trainer at the same time.

        Raises:
            ValueError: `load_format` is not known.
        """
        load_format = load_format or "auto"
        if load_format not in LOAD_FORMATS:
            raise ValueError(f"load_format={load_format!r}: must be one of {', '.join(LOAD_FORMATS)}")
        try:
            return await self._update(
                lambda number, op_id: ReceiveWeightsReq(
                    number, op_id, names, dtypes, shapes, group_name, load_format, options
                ),
                options,
                abort_all_requests,
            )
        except NotDrainedError:
            # The trainer broadcasts already, to nobody: what it sends must not be taken for a later bucket.
            await self.destroy_weights_update_group(group_name)
            raise

    async def _update(
        self, make: Callable[[int, str], NumberedMessage], options: WeightOptions, abort_all_requests: bool
    ) -> ControlReply:
        """Unless the engine is paused, what runs comes to its end first, and nothing new comes in."""
        if abort_all_requests:
            self._link.send_to_all(abort_everything)
        async with self._gate.closed(drain=True):
            reply = await self._send_and_hold(make)
        if reply.success and options.flush_cache:
            self._dp_router.forget_prefixes()
        return reply

    async def get_weights_by_name(self, name: str, truncate_size: int = 100) -> tuple[ControlReply, Any]:
        """The first `truncate_size` rows of a tensor as nested lists, with None for values that are not finite; None if the
        reply says why not.

        Raises:
            ValueError: `truncate_size` is below 1.
        """
        if truncate_size < 1:
            raise ValueError(f"truncate_size={truncate_size}: must be at least 1")
        reply = await self._send(lambda number, op_id: GetWeightsReq(number, op_id, name, truncate_size))
        return reply, msgspec.json.decode(reply.payload) if reply.success else None

    async def checksum_weights(self) -> tuple[ControlReply, dict[str, str]]:
        """A checksum by tensor, as `engine.weight_sync.checksum` makes it of the whole tensor in the engine's dtype."""
        reply = await self._send(ChecksumWeightsReq, self._transfer_timeout_s)
        return reply, msgspec.json.decode(reply.payload, type=dict[str, str]) if reply.success else {}

    # --- memory -----------------------------------------------------------------------------------------------------

    async def release_memory_occupation(self, tags: Sequence[str] | None = None) -> ControlReply:
        """Only when nothing runs or waits."""
        async with self._gate.closed(drain=False):
            reply = await self._send_and_hold(
                lambda number, op_id: ReleaseMemoryReq(number, op_id, list(tags or MEMORY_TAGS))
            )
        if reply.success:
            self._dp_router.forget_prefixes()
        return reply

    async def resume_memory_occupation(self, tags: Sequence[str] | None = None) -> ControlReply:
        async with self._gate.closed(drain=False):
            reply = await self._send_and_hold(
                lambda number, op_id: ResumeMemoryReq(number, op_id, list(tags or MEMORY_TAGS))
            )
        return reply


def abort_everything(number: int) -> NumberedMessage:
    return AbortReq(number, abort_all=True)
