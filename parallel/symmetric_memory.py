"""Collectives between the GPUs of one host through memory that each can read and write of the others (torch's symmetric
memory), without NCCL's set-up: kernels of ours, and torch's two-shot all-reduce for many rows on many ranks. A CUDA graph
can record them.

A kernel waits for the other ranks' without a bound of its own. A rank that has ended or is stopped, or a step that does not
end, is noticed on the host (lifelines, the heartbeat, a watchdog), which ends the process and with it the kernel.

Legend: n ranks, T rows of a partial sum, P rows of each rank, D hidden, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from .symmetric_triton import AddNorm, Lane

# Ranks that torch has a two-shot all-reduce for.
SIZES = (2, 4, 8)
DTYPES = (torch.bfloat16, torch.float32)
ALIGNMENT = 16
FLAG_BYTES = WORD_BYTES = 4
PACKET_BYTES = 8
# Rows that travel as packets, see `symmetric_triton`, and the memory for more.
MAX_PACKET_ROWS = 64
PLAIN_BYTES = 144 << 20
# More ranks than two: beyond so many rows over the number of others, each rank sums a share and hands it out.
MAX_ONE_SHOT_ROWS = 128
MAX_TWO_SHOT_BYTES = 16 << 20


@dataclass(frozen=True)
class RowLayout:
    """What the ranks send each other at most for a row: a hidden state, int32 ids of experts, their weights."""

    width: int  # D
    top_k: int
    dtype: torch.dtype

    @property
    def num_words(self) -> int:
        """Of four bytes each; ids and weights have one of their own."""
        return -(-self.width * self.dtype.itemsize // WORD_BYTES) + 2 * self.top_k


class SymmetricMemory:
    """One rank's end of an axis. All ranks must call it in the same order with the same shapes."""

    def __init__(self, lanes: list[Lane], layout: RowLayout, whole: torch.Tensor | None, group_name: str) -> None:
        self._lanes = lanes
        self._layout = layout
        self._whole = whole
        self._group_name = group_name
        self._size = len(lanes[0].data_of)

    @staticmethod
    def of(group: dist.ProcessGroup, layout: RowLayout, device: torch.device) -> SymmetricMemory:
        """The group's, made by all of its ranks together; their devices must reach each other."""
        # A part of torch's CUDA builds alone.
        import torch.distributed._symmetric_memory as symmetric  # noqa: PLC0415

        size = group.size()
        max_rows = PLAIN_BYTES // (2 * size * layout.num_words * WORD_BYTES)
        lanes = [
            make_lane(group, layout, MAX_PACKET_ROWS, device, in_packets=True),
            make_lane(group, layout, max_rows, device, in_packets=False),
        ]
        whole = None
        if size > 2:
            whole = symmetric.empty(MAX_TWO_SHOT_BYTES, dtype=torch.uint8, device=device)
            meet(group)
            symmetric.rendezvous(whole, group.group_name)
        torch.cuda.synchronize(device)
        # Nobody may set a flag before all have cleared theirs.
        dist.barrier(group)
        return SymmetricMemory(lanes, layout, whole, group.group_name)

    def sums(self, x: torch.Tensor, *, scatter: bool) -> bool:
        """Whether `sum_rows` takes x: a matter of its shape and dtype, so that all ranks say the same."""
        if x.dim() != 2 or x.dtype != self._layout.dtype or not x.is_contiguous():
            return False
        if x.shape[1] > self._layout.width or x.shape[1] * x.itemsize % WORD_BYTES:
            return False
        num_rows = x.shape[0]
        if scatter:
            return self._lane_for(num_rows // self._size) is not None
        if self._size > 2 and num_rows * (self._size - 1) > MAX_ONE_SHOT_ROWS:
            return False
        return self._lane_for(num_rows) is not None

    def sum_rows(self, x: torch.Tensor, *, scatter: bool, then: AddNorm | None = None) -> torch.Tensor:
        """The ranks' sum of x [T, D], rounded once, and what follows it; with `scatter` this rank's rows of it alone."""
        # Kernels come with torch's CUDA builds alone.
        from .symmetric_triton import sum_rows  # noqa: PLC0415

        lane = self._lane_for(x.shape[0] // self._size if scatter else x.shape[0])
        assert lane is not None
        return sum_rows(x, lane, scatter=scatter, then=then)

    def takes_two_shots(self, x: torch.Tensor) -> bool:
        """Whether `two_shot_all_reduce` takes x; the same on all ranks."""
        if self._whole is None or x.dtype not in DTYPES or not x.is_contiguous():
            return False
        return 0 < x.nbytes <= MAX_TWO_SHOT_BYTES and x.nbytes % ALIGNMENT == 0

    def two_shot_all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum, in a tensor of its own; the same bits on every rank."""
        assert self._whole is not None
        shared = self._whole[: x.nbytes].view(x.dtype).view(x.shape)
        shared.copy_(x)
        return torch.ops.symm_mem.two_shot_all_reduce_out(shared, "sum", self._group_name, torch.empty_like(x))

    def gathers(self, hidden: torch.Tensor) -> bool:
        """Whether `gather_routed` takes hidden; the same on all ranks."""
        is_whole = hidden.shape[1] * hidden.itemsize % WORD_BYTES == 0
        return hidden.dtype == self._layout.dtype and is_whole and self._lane_for(hidden.shape[0]) is not None

    def gather_routed(
        self,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        is_padding: torch.Tensor | None,
        record: torch.Tensor | None,
        first_recorded: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states [P, D], ids [P, K] and weights [P, K] of all ranks in rank order; see `symmetric_triton`."""
        from .symmetric_triton import gather_routed  # noqa: PLC0415

        lane = self._lane_for(hidden.shape[0])
        assert lane is not None
        return gather_routed(hidden, ids, weights, is_padding, lane, record, first_recorded)

    def lane_of_choices(self, num_choices: int) -> Lane | None:
        """Where so many scores and ids fit as packets; the same on all ranks."""
        lane = self._lanes[0]
        fits = num_choices > 0 and 2 * lane.choices_a_row(num_choices) * PACKET_BYTES <= lane.row_bytes
        return lane if fits else None

    def _lane_for(self, num_rows: int) -> Lane | None:
        if num_rows == 0:
            return None
        return next((lane for lane in self._lanes if num_rows <= len(lane.calls)), None)


def meet(group: dist.ProcessGroup) -> None:
    """Wait for the others as one waits in gloo. In a rendezvous of torch's a rank holds the interpreter meanwhile, so that
    its heartbeat stops for as long as another one is late."""
    dist.all_reduce(torch.zeros(1), group=group)


def make_lane(
    group: dist.ProcessGroup, layout: RowLayout, max_rows: int, device: torch.device, *, in_packets: bool
) -> Lane:
    """Made by all ranks of the group together."""
    import torch.distributed._symmetric_memory as symmetric  # noqa: PLC0415

    from .symmetric_triton import Lane  # noqa: PLC0415

    size = group.size()
    row_bytes = -(-layout.num_words * (PACKET_BYTES if in_packets else WORD_BYTES) // ALIGNMENT) * ALIGNMENT
    data_bytes = 2 * max_rows * size * row_bytes
    buffer = symmetric.empty(data_bytes + max_rows * size * FLAG_BYTES, dtype=torch.uint8, device=device).zero_()
    meet(group)
    data_of = torch.tensor(symmetric.rendezvous(buffer, group.group_name).buffer_ptrs, device=device)
    return Lane(
        calls=torch.zeros(max_rows, dtype=torch.int32, device=device),
        flags=buffer[data_bytes:].view(torch.int32).view(max_rows, size),
        data_of=data_of,
        flags_of=data_of + data_bytes,
        row_bytes=row_bytes,
        rank=group.rank(),
        in_packets=in_packets,
    )
