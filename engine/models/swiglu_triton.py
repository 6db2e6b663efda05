"""`LayerOps.swiglu` as one Triton kernel, with the roundings of its torch twin."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...parallel.moe.experts_triton import rounded_swiglu
from ...parallel.triton_launch import Kernel, ceil_div, launch_options, start_next, wait_for_previous

COLUMNS = 512


@Kernel
@triton.jit
def _swiglu_kernel(gate_up, out, width, COLUMNS: tl.constexpr, PDL: tl.constexpr):
    start_next(PDL)
    wait_for_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    kept = columns < width
    row = gate_up + token * 2 * width + columns
    gate, up = tl.load(row, kept, other=0.0).to(tl.float32), tl.load(row + width, kept, other=0.0).to(tl.float32)
    tl.store(out + token * width + columns, rounded_swiglu(gate, up, out.dtype.element_ty), kept)


def swiglu_triton(gate_up: torch.Tensor) -> torch.Tensor:
    """See `LayerOps`."""
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(num_tokens, width)
    if num_tokens:
        _swiglu_kernel[(num_tokens, ceil_div(width, COLUMNS))](
            gate_up, out, width, COLUMNS=COLUMNS, num_warps=4, **launch_options(gate_up.device)
        )
    return out
