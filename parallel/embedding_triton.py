"""Twin of `look_up_torch` in embedding.py: one kernel, which reads the rows that a rank holds and no other."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .triton_launch import Kernel, ceil_div, launch_options, power_of_2_from, start_next, wait_for_previous


@Kernel
@triton.jit
def _look_up_kernel(ids, weight, out, first, num_rows, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    start_next(PDL)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    kept = columns < width
    wait_for_previous(PDL)
    row = tl.load(ids + token) - first
    held = (row >= 0) & (row < num_rows)
    value = tl.load(weight + row * width + columns, kept & held, other=0.0)
    tl.store(out + token * width + columns, value, kept)


def look_up_triton(ids: torch.Tensor, weight: torch.Tensor, first: int) -> torch.Tensor:
    """See `look_up_torch`."""
    (num_rows, width), num_tokens = weight.shape, len(ids)
    out = weight.new_empty(num_tokens, width)
    block = min(1024, power_of_2_from(width))
    _look_up_kernel[(num_tokens, ceil_div(width, block))](
        ids, weight, out, first, num_rows, width, BLOCK=block, num_warps=4, **launch_options(ids.device)
    )
    return out
