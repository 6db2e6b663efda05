"""Experts for a handful of tokens, in Triton: matrix-vector products, one per token and choice.

With so few tokens hardly any two choose the same expert, so nothing is sorted: each program holds a block of one expert's
weights (`gate_up`) or of all experts of one token (`down`) in registers, every byte of it in flight at once.

Legend: T tokens, D hidden, F experts on this rank, K experts per token, I intermediate width on this rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_launch import Kernel, ceil_div, launch_options, power_of_2_from, start_next, wait_for_previous
from .activation import ClampedExperts
from .experts_triton import clamp_arguments, rounded_clamped_swiglu, rounded_swiglu

# Rows of weights that a program holds.
COLUMNS = 2


@Kernel
@triton.jit
def _gate_up_kernel(
    hidden, ids, gate_up, bias, activated, num_experts, width, intermediate, first, alpha, limit, TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, CLAMPED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    start_next(PDL)
    block, pair = tl.program_id(0), tl.program_id(1)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    kept = columns < intermediate
    depth = tl.arange(0, DEPTH)
    inside = depth < width
    mask = kept[:, None] & inside[None, :]
    dtype = hidden.dtype.element_ty
    wait_for_previous(PDL)
    expert = tl.load(ids + pair) - first
    if (expert < 0) | (expert >= num_experts):
        return
    where = gate_up + expert.to(tl.int64) * 2 * intermediate * width + depth[None, :]
    if CLAMPED:
        where += columns[:, None] * 2 * width
        gate_tile, up_tile = tl.load(where, mask, other=0.0), tl.load(where + width, mask, other=0.0)
    else:
        where += columns[:, None] * width
        gate_tile = tl.load(where, mask, other=0.0)
        up_tile = tl.load(where + intermediate * width, mask, other=0.0)
    x = tl.load(hidden + (pair // TOP_K).to(tl.int64) * width + depth, inside, other=0.0).to(tl.float32)[None, :]
    gate = tl.sum(gate_tile.to(tl.float32) * x, axis=1)
    up = tl.sum(up_tile.to(tl.float32) * x, axis=1)
    if CLAMPED:
        biases = bias + expert * 2 * intermediate + columns * 2
        gate_bias, up_bias = tl.load(biases, kept, other=0.0), tl.load(biases + 1, kept, other=0.0)
        value = rounded_clamped_swiglu(gate, up, gate_bias, up_bias, alpha, limit, dtype)
    else:
        value = rounded_swiglu(gate, up, dtype)
    tl.store(activated + pair.to(tl.int64) * intermediate + columns, value, kept)


@Kernel
@triton.jit
def _down_kernel(
    activated, ids, weights, down, bias, out, num_experts, width, intermediate, first, TOP_K: tl.constexpr,
    K_BLOCK: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BIASED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    start_next(PDL)
    block, token = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    kept = columns < width
    depth = tl.arange(0, DEPTH)
    inside = depth < intermediate
    choices = tl.arange(0, K_BLOCK)
    pairs = token * TOP_K + choices
    dtype = out.dtype.element_ty
    wait_for_previous(PDL)
    experts = tl.load(ids + pairs, choices < TOP_K, other=-1).to(tl.int64) - first
    held = (experts >= 0) & (experts < num_experts)
    mask = held[:, None, None] & kept[None, :, None] & inside[None, None, :]
    base = tl.where(held, experts, 0) * intermediate * width
    where = base[:, None, None] + columns[None, :, None] * intermediate + depth[None, None, :]
    tile = tl.load(down + where, mask, other=0.0)
    rows = pairs[:, None] * intermediate + depth[None, :]
    x = tl.load(activated + rows, held[:, None] & inside[None, :], other=0.0).to(tl.float32)
    values = tl.sum(tile.to(tl.float32) * x[:, None, :], axis=2).to(dtype).to(tl.float32)
    if BIASED:
        rows = bias + tl.where(held, experts, 0)[:, None] * width + columns[None, :]
        value = values + tl.load(rows, held[:, None] & kept[None, :], other=0.0).to(tl.float32)
        values = value.to(dtype).to(tl.float32)
    scale = tl.load(weights + pairs, choices < TOP_K, other=0.0).to(tl.float32)
    total = tl.sum((values * scale[:, None]).to(dtype).to(tl.float32), axis=0)
    tl.store(out + token * width + columns, total.to(dtype), kept)


def experts_few_triton(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    first: int = 0,
    clamped: ClampedExperts | None = None,
) -> torch.Tensor:
    """An `ExpertsFunction`, see experts.py, of the experts from `first` on."""
    (num_tokens, top_k), (num_local, width, intermediate) = ids.shape, down.shape
    activated = hidden.new_empty(num_tokens * top_k, intermediate)
    out = torch.empty_like(hidden)
    sizes = (num_local, width, intermediate)
    options = launch_options(hidden.device)
    up_bias, down_bias, alpha, limit = clamp_arguments(clamped, hidden)
    _gate_up_kernel[(ceil_div(intermediate, COLUMNS), num_tokens * top_k)](
        hidden, ids, gate_up, up_bias, activated, *sizes, first, alpha, limit, TOP_K=top_k, COLUMNS=COLUMNS,
        DEPTH=power_of_2_from(width), CLAMPED=clamped is not None, num_warps=4, **options,
    )  # fmt: skip
    _down_kernel[(ceil_div(width, COLUMNS), num_tokens)](
        activated, ids, weights, down, down_bias, out, *sizes, first, TOP_K=top_k, K_BLOCK=power_of_2_from(top_k),
        COLUMNS=COLUMNS, DEPTH=power_of_2_from(intermediate), BIASED=clamped is not None, num_warps=4, **options,
    )  # fmt: skip
    return out
