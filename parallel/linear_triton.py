"""The product of one row with a matrix, in Triton: reads the weights at the speed of memory.

A library's product for one row is a matrix product with most of its tile empty. Here a program holds some rows of the
weight whole, loaded before the kernel ahead is done.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .triton_launch import Kernel, ceil_div, launch_options, power_of_2_from, start_next, wait_for_previous

# Programs that keep the device busy.
WANTED_PROGRAMS = 512
MAX_COLUMNS = 2
MAX_TILE = 32768
# Elements that one warp holds.
PER_WARP = 2048


@Kernel
@triton.jit
def _matvec_kernel(
    x, weight, out, num_outputs, width, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    start_next(PDL)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    kept = columns < num_outputs
    depth = tl.arange(0, DEPTH)
    inside = depth < width
    where = columns[:, None].to(tl.int64) * width + depth[None, :]
    tile = tl.load(weight + where, kept[:, None] & inside[None, :], other=0.0)
    wait_for_previous(PDL)
    row = tl.load(x + depth, inside, other=0.0).to(tl.float32)
    value = tl.sum(tile.to(tl.float32) * row[None, :], axis=1)
    tl.store(out + columns, value.to(out.dtype.element_ty), kept)


def linear_triton(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Twin of `torch.nn.functional.linear` for x [T, D]; for one row without a bias through the kernel above."""
    num_outputs, width = weight.shape
    depth = power_of_2_from(width)
    columns = min(MAX_COLUMNS, power_of_2_from(ceil_div(num_outputs, WANTED_PROGRAMS)))
    if x.shape[0] != 1 or bias is not None or columns * depth > MAX_TILE:
        return F.linear(x, weight, bias)
    out = x.new_empty(1, num_outputs)
    _matvec_kernel[(ceil_div(num_outputs, columns),)](
        x, weight, out, num_outputs, width, COLUMNS=columns, DEPTH=depth,
        num_warps=max(1, min(8, columns * depth // PER_WARP)), **launch_options(x.device),
    )  # fmt: skip
    return out
