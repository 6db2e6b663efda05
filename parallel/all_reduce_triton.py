"""A one-shot all-reduce of a few rows between the GPUs of one host, in one kernel.

A program per row writes the row to memory that all ranks can read, tells each of the others so by a flag in theirs, waits
for their flags and sums their rows in rank order, so that every rank gets the same bits. Rows are numbered by calls: a
row's n-th call uses one of two places in turn, which is free again, because whoever has sent a flag of call n has done
with call n - 1. There is no barrier at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .triton_launch import Kernel, launch_options, power_of_2_from, start_next, wait_for_previous


@Kernel
@triton.jit
def _all_reduce_kernel(
    x, out, calls, flags, data_of, flags_of, num_columns, rank, stride,
    SIZE: tl.constexpr, MAX_ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    start_next(PDL)
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < num_columns
    dtype = x.dtype.element_ty
    wait_for_previous(PDL)
    call = tl.load(calls + row) + 1
    place = ((call & 1) * MAX_ROWS + row).to(tl.int64) * stride
    value = tl.load(x + row.to(tl.int64) * num_columns + columns, mask, other=0.0)
    own = tl.load(data_of + rank).to(tl.pointer_type(dtype))
    tl.store(own + place + columns, value, mask)
    tl.debug_barrier()
    for peer in tl.static_range(SIZE):
        if peer != rank:
            theirs = tl.load(flags_of + peer).to(tl.pointer_type(tl.int32))
            tl.atomic_xchg(theirs + row * SIZE + rank, call, sem="release", scope="sys")
    for peer in tl.static_range(SIZE):
        if peer != rank:
            seen = tl.atomic_add(flags + row * SIZE + peer, 0, sem="acquire", scope="sys")
            # Calls may overflow: their difference does not.
            while seen - call < 0:
                seen = tl.atomic_add(flags + row * SIZE + peer, 0, sem="acquire", scope="sys")
    tl.debug_barrier()
    total = tl.zeros((BLOCK,), tl.float32)
    for peer in tl.static_range(SIZE):
        theirs = tl.load(data_of + peer).to(tl.pointer_type(dtype))
        total += tl.load(theirs + place + columns, mask, other=0.0, volatile=True).to(tl.float32)
    tl.store(out + row.to(tl.int64) * num_columns + columns, total.to(dtype), mask)
    tl.store(calls + row, call)


def all_reduce_rows(
    x: torch.Tensor,
    calls: torch.Tensor,
    flags: torch.Tensor,
    data_of: torch.Tensor,
    flags_of: torch.Tensor,
    rank: int,
    stride: int,
) -> torch.Tensor:
    """Sum of the ranks' x [T, D].

    Args:
        calls: [R] int32, calls of each row so far; R is the most rows there may be.
        flags: [R, n] int32, this rank's flags, by row and rank that sets them.
        data_of: [n] int64, addresses of each rank's places, [2, R] of `stride` elements.
        flags_of: [n] int64, addresses of each rank's flags.
    """
    out = torch.empty_like(x)
    num_rows, num_columns = x.shape
    block = power_of_2_from(num_columns)
    _all_reduce_kernel[(num_rows,)](
        x, out, calls, flags, data_of, flags_of, num_columns, rank, stride,
        SIZE=len(data_of), MAX_ROWS=len(calls), BLOCK=block,
        num_warps=max(1, min(8, block // 256)), **launch_options(x.device),
    )  # fmt: skip
    return out
