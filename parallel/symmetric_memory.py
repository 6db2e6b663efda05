"""All-reduces between the GPUs of one host through memory that each can read and write of the others (torch's symmetric
memory), without NCCL's set-up: one kernel of ours for a few rows, one of torch's for more. A CUDA graph can record both.

A kernel waits for the other ranks' without a bound of its own. A rank that has ended or is stopped is noticed on the host
(lifelines, the heartbeat), which ends the process and with it the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

# Rows of a one-shot all-reduce, in which every rank reads the rows of all others: so many on two ranks, fewer on more.
# Beyond, each rank sums a share of the tensor and hands it out, which is faster from there on.
MAX_ROWS = 64
MAX_ROW_BYTES = 32 << 10
# 4,096 rows of 2,048 values of two bytes; beyond, NCCL is as fast.
MAX_BYTES = 16 << 20
ALIGNMENT = 16
DTYPES = (torch.bfloat16, torch.float32)
FLAG_BYTES = 4
# Ranks that torch has a two-shot all-reduce for.
SIZES = (2, 4, 8)


class SymmetricMemory:
    """One rank's end. `buffer_addresses` are those of all ranks' buffers of equal layout: places of rows, flags, and a
    tensor in one piece."""

    def __init__(
        self, buffer: torch.Tensor, buffer_addresses: Sequence[int], rank: int, whole: torch.Tensor, group_name: str
    ) -> None:
        size = len(buffer_addresses)
        data_bytes = 2 * MAX_ROWS * MAX_ROW_BYTES
        self._max_rows = MAX_ROWS // (size - 1)
        self._rank = rank
        self._whole = whole
        self._group_name = group_name
        self._buffer = buffer
        self._calls = torch.zeros(MAX_ROWS, dtype=torch.int32, device=buffer.device)
        self._flags = buffer[data_bytes:].view(torch.int32).view(MAX_ROWS, size)
        self._data_of = torch.tensor(list(buffer_addresses), device=buffer.device)
        self._flags_of = self._data_of + data_bytes

    @staticmethod
    def of(group: dist.ProcessGroup, device: torch.device) -> SymmetricMemory:
        """The group's, made by all of its ranks together; their devices must reach each other."""
        # A part of torch's CUDA builds alone.
        import torch.distributed._symmetric_memory as symmetric  # noqa: PLC0415

        num_bytes = 2 * MAX_ROWS * MAX_ROW_BYTES + MAX_ROWS * group.size() * FLAG_BYTES
        buffer = symmetric.empty(num_bytes, dtype=torch.uint8, device=device).zero_()
        whole = symmetric.empty(MAX_BYTES, dtype=torch.uint8, device=device)
        addresses = symmetric.rendezvous(buffer, group.group_name).buffer_ptrs
        symmetric.rendezvous(whole, group.group_name)
        torch.cuda.synchronize(device)
        # Nobody may set a flag before all have cleared theirs.
        dist.barrier(group)
        return SymmetricMemory(buffer, addresses, group.rank(), whole, group.group_name)

    def takes(self, x: torch.Tensor) -> bool:
        is_sized = 0 < x.nbytes <= MAX_BYTES and x.nbytes % ALIGNMENT == 0
        return is_sized and x.dtype in DTYPES and x.is_contiguous() and x.device == self._buffer.device

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum, in a tensor of its own; the same bits on every rank."""
        if x.dim() == 2 and x.shape[0] <= self._max_rows and x.shape[1] * x.itemsize <= MAX_ROW_BYTES:
            # Kernels come with torch's CUDA builds alone.
            from .all_reduce_triton import all_reduce_rows  # noqa: PLC0415

            stride = MAX_ROW_BYTES // x.itemsize
            return all_reduce_rows(x, self._calls, self._flags, self._data_of, self._flags_of, self._rank, stride)
        shared = self._whole[: x.nbytes].view(x.dtype).view(x.shape)
        shared.copy_(x)
        return torch.ops.symm_mem.two_shot_all_reduce_out(shared, "sum", self._group_name, torch.empty_like(x))
