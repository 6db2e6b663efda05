"""vLLM's words for weights from a trainer, as operations: its group, its tensors, and the end of an update."""

from __future__ import annotations

from pydantic import Field

from ...control.blocked import BlockedKind
from ...control.operations import (
    DEFAULT_GROUP,
    Count,
    DestroyWeightsUpdateGroup,
    InitWeightsUpdateGroup,
    Name,
    Port,
    UpdateWeightsFromDisk,
    UpdateWeightsFromDistributed,
    UpdateWeightVersion,
)
from ...frontend.tokenizer_manager import TokenizerManager
from ...ipc.frontend_messages import ControlReply
from ...validation import dialect_fields
from ...validation.field_error import FieldError
from ...validation.request_model import Items, Number, RequestModel

# Of a packed broadcast, unless the trainer says otherwise.
PACKED_BYTES = 1 << 30
NOT_CHECKPOINT = "is_checkpoint_format: must be true, weights are taken in the checkpoint's names and shapes"


class InitInfo(RequestModel):
    """Of vLLM's NCCL transfer: the trainer is rank 0, engine ranks follow from `rank_offset`."""

    neutral_fields = dialect_fields.VLLM_TRANSFER

    master_address: Name
    master_port: Port
    rank_offset: Count
    world_size: Count
    # Newer trainers say it here for all updates, not in each.
    packed: bool = False
    packed_buffer_size_bytes: Number = Field(PACKED_BYTES, ge=1)
    packed_num_buffers: Number = 2


class UpdateInfo(RequestModel):
    """Tensors that rank 0 broadcasts, one by one or `packed`: as many as come to more than `packed_buffer_size_bytes`."""

    neutral_fields = dialect_fields.VLLM_TRANSFER

    names: Items[Name]
    dtype_names: Items[Name]
    shapes: Items[Items[Count]]
    packed: bool = False
    packed_buffer_size_bytes: Number = PACKED_BYTES
    # How many wait at the sender and at the receiver; these wait for nobody.
    packed_num_buffers: Number = 2

    def operation(self, packed_bytes: int) -> UpdateWeightsFromDistributed:
        """With what the group was made with, where the update does not say it."""
        if self.packed_buffer_size_bytes < 1:
            raise FieldError(
                f"packed_buffer_size_bytes={self.packed_buffer_size_bytes}: must be at least 1",
                "packed_buffer_size_bytes",
            )
        return UpdateWeightsFromDistributed(
            self.names,
            self.dtype_names,
            self.shapes,
            packed_bytes=self.packed_buffer_size_bytes if self.packed else packed_bytes,
            flush_cache=False,
        )


class WeightTransfer:
    """An update in vLLM's steps. The prefix cache stays, as there: a pause or `/reset_prefix_cache` empties it, and a
    `cache_salt` for each version makes that unnecessary."""

    def __init__(self, manager: TokenizerManager) -> None:
        self._manager = manager
        self._packed_bytes = 0

    async def join(self, info: InitInfo) -> ControlReply:
        """The group; one of before is left, since a trainer that starts again does not say goodbye."""
        await self._manager.controls.run(DestroyWeightsUpdateGroup())
        self._packed_bytes = info.packed_buffer_size_bytes if info.packed else 0
        operation = InitWeightsUpdateGroup(info.master_address, info.master_port, info.rank_offset, info.world_size)
        return await self._manager.controls.run(operation)

    async def receive(self, info: UpdateInfo) -> ControlReply:
        return await self._manager.controls.run(info.operation(self._packed_bytes))

    async def load(self, folder: str) -> ControlReply:
        """A checkpoint that every rank can open."""
        return await self._manager.controls.run(UpdateWeightsFromDisk(folder, flush_cache=False))

    async def finish(self, weight_version: str | None) -> str | None:
        """The end of an update, which may leave tensors as they are. Why the weights are not whole; None if they are."""
        blocked = self._manager.blocked
        if blocked is not None and blocked.kind is BlockedKind.INCOMPLETE:
            operation = UpdateWeightsFromDistributed(
                [], [], [], DEFAULT_GROUP, is_last=True, weight_version=weight_version, flush_cache=False
            )
            reply = await self._manager.controls.run(operation)
            return None if reply.success else reply.message
        if blocked is not None and blocked.kind is not BlockedKind.RELEASED:
            return blocked.message
        if weight_version is not None:
            await self._manager.controls.run(UpdateWeightVersion(weight_version, abort_all_requests=False))
        return None
