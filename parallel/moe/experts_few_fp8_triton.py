"""Experts in block FP8 for a handful of tokens, in Triton: matrix-vector products as in experts_few_triton.py, with a scale
for every group of columns.

Legend: T tokens, D hidden, F experts on this rank, K experts per token, I intermediate width on this rank, G the columns of
a grid.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..fp8 import MAX_E4M3, MIN_AMAX
from ..fp8_triton import quantise_group, row_in_groups, rows_of_tile
from ..triton_launch import Kernel, ceil_div, launch_options, power_of_2_from, start_next, wait_for_previous
from ..weight_format import Fp8Matrix
from .experts_triton import rounded_swiglu


@Kernel
@triton.jit
def _gate_up_kernel(
    hidden, ids, gate_up, scales, activated, num_experts, width, intermediate, first, num_groups, TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr, GROUPS: tl.constexpr, GRID_ROWS: tl.constexpr, GROUP: tl.constexpr, QUANTISES: tl.constexpr,
    MAX: tl.constexpr, MIN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    start_next(PDL)
    block, pair = tl.program_id(0), tl.program_id(1)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    groups, steps = tl.arange(0, GROUPS), tl.arange(0, GROUP)
    kept, there = columns < intermediate, groups < num_groups
    where = groups[:, None] * GROUP + steps[None, :]
    mask = kept[:, None, None] & (where < width)[None, :, :]
    wait_for_previous(PDL)
    expert = (tl.load(ids + pair) - first).to(tl.int64)
    if (expert < 0) | (expert >= num_experts):
        return
    tiles = gate_up + expert * 2 * intermediate * width + columns[:, None, None] * width + where[None, :, :]
    gate_tile = tl.load(tiles, mask, other=0.0)
    up_tile = tl.load(tiles + intermediate * width, mask, other=0.0)
    scales += expert * tl.cdiv(2 * intermediate, GRID_ROWS) * num_groups
    is_scale = kept[:, None] & there[None, :]
    gate_scale = tl.load(scales + columns[:, None] // GRID_ROWS * num_groups + groups[None, :], is_scale, other=0.0)
    rows = (columns[:, None] + intermediate) // GRID_ROWS
    up_scale = tl.load(scales + rows * num_groups + groups[None, :], is_scale, other=0.0)
    token = (pair // TOP_K).to(tl.int64)
    x, x_scale = row_in_groups(
        hidden, token * width, width, groups, steps, QUANTISES, MAX, MIN, gate_up.dtype.element_ty
    )
    gate = tl.sum(tl.sum(gate_tile.to(tl.float32) * x[None, :, :], axis=2) * (gate_scale * x_scale[None, :]), axis=1)
    up = tl.sum(tl.sum(up_tile.to(tl.float32) * x[None, :, :], axis=2) * (up_scale * x_scale[None, :]), axis=1)
    value = rounded_swiglu(gate, up, hidden.dtype.element_ty)
    tl.store(activated + pair.to(tl.int64) * intermediate + columns, value, kept)


@Kernel
@triton.jit
def _down_kernel(
    activated, ids, weights, down, scales, out, num_experts, width, intermediate, first, num_groups,
    TOP_K: tl.constexpr, K_BLOCK: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, GRID_ROWS: tl.constexpr,
    GROUP: tl.constexpr, QUANTISES: tl.constexpr, MAX: tl.constexpr, MIN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """All choices of a token at once. A part [n, G] is a group of a choice, n = K * groups."""
    start_next(PDL)
    block, token = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    kept, steps, parts = columns < width, tl.arange(0, GROUP), tl.arange(0, K_BLOCK * GROUPS)
    choice, group = parts // GROUPS, parts % GROUPS
    pairs = token * TOP_K + choice
    dtype = out.dtype.element_ty
    wait_for_previous(PDL)
    experts = tl.load(ids + pairs, choice < TOP_K, other=-1).to(tl.int64) - first
    held = (experts >= 0) & (experts < num_experts) & (choice < TOP_K)
    experts = tl.where(held, experts, 0)
    depth = group[:, None] * GROUP + steps[None, :]
    inside = held[:, None] & (depth < intermediate)
    base = down + experts[:, None] * width * intermediate + depth
    tile = tl.load(
        base[None, :, :] + columns[:, None, None] * intermediate, kept[:, None, None] & inside[None, :, :], other=0.0
    )
    row = experts[None, :] * tl.cdiv(width, GRID_ROWS) + columns[:, None] // GRID_ROWS
    is_scale = kept[:, None] & (held & (group < num_groups))[None, :]
    scale = tl.load(scales + row * num_groups + group[None, :], is_scale, other=0.0)
    x = tl.load(activated + pairs[:, None] * intermediate + depth, inside, other=0.0)
    if QUANTISES:
        x, x_scale = quantise_group(x, MAX, MIN, down.dtype.element_ty)
        scale *= x_scale[None, :]
    sums = tl.sum(tile.to(tl.float32) * x.to(tl.float32)[None, :, :], axis=2) * scale
    values = tl.sum(tl.reshape(sums, (COLUMNS, K_BLOCK, GROUPS)), axis=2).to(dtype).to(tl.float32)
    choices = tl.arange(0, K_BLOCK)
    weight = tl.load(weights + token * TOP_K + choices, choices < TOP_K, other=0.0).to(tl.float32)
    total = tl.sum((values * weight[None, :]).to(dtype).to(tl.float32), axis=1)
    tl.store(out + token * width + columns, total.to(dtype), kept)


def experts_few_fp8_triton(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: Fp8Matrix,
    down: Fp8Matrix,
    *,
    first: int = 0,
) -> torch.Tensor:
    """An `ExpertsFunction`, see experts.py, of the experts from `first` on."""
    (num_tokens, top_k), (num_local, width, intermediate) = ids.shape, down.data.shape
    activated, out = hidden.new_empty(num_tokens * top_k, intermediate), torch.empty_like(hidden)
    sizes, options = (num_local, width, intermediate, first), launch_options(hidden.device)
    limits = {"MAX": MAX_E4M3, "MIN": MIN_AMAX}
    num_groups = gate_up.scales.shape[-1]
    groups = power_of_2_from(num_groups)
    columns = rows_of_tile(groups * gate_up.grid.columns)
    _gate_up_kernel[(ceil_div(intermediate, columns), num_tokens * top_k)](
        hidden, ids, gate_up.data, gate_up.scales, activated, *sizes, num_groups, TOP_K=top_k, COLUMNS=columns,
        GROUPS=groups, GRID_ROWS=gate_up.grid.rows, GROUP=gate_up.grid.columns,
        QUANTISES=gate_up.quantises, **limits, num_warps=4, **options,
    )  # fmt: skip
    num_groups = down.scales.shape[-1]
    groups, choices = power_of_2_from(num_groups), power_of_2_from(top_k)
    columns = 2 * rows_of_tile(choices * groups * down.grid.columns)
    _down_kernel[(ceil_div(width, columns), num_tokens)](
        activated, ids, weights, down.data, down.scales, out, *sizes, num_groups, TOP_K=top_k, K_BLOCK=choices,
        COLUMNS=columns, GROUPS=groups, GRID_ROWS=down.grid.rows, GROUP=down.grid.columns, QUANTISES=down.quantises,
        **limits, num_warps=4, **options,
    )  # fmt: skip
    return out
