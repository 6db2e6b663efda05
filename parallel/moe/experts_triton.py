"""Experts for any number of tokens, in Triton: tokens sorted by expert, products tiled, nothing waits for the host.

Every program finds its tile in the sorted order by itself (`expert_order_triton.py`), so the grid's size depends on shapes
alone and the kernels serve in CUDA graphs. Rows of tokens are gathered inside the product, and SwiGLU is applied to it
while it is in registers.

Legend: T tokens, D hidden, F experts on this rank, K experts per token, I intermediate width on this rank, P = T * K.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..triton_launch import Kernel, ceil_div, launch_options, power_of_2_from, start_next, wait_for_previous
from .activation import ClampedExperts
from .expert_order_triton import combine_pairs, sort_by_expert, tile_of


@triton.jit
def rounded_swiglu(gate, up, dtype: tl.constexpr):
    """SwiGLU in float32 with torch's roundings to `dtype`."""
    gate = gate.to(dtype).to(tl.float32)
    gate = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    return (gate * up.to(dtype).to(tl.float32)).to(dtype)


@triton.jit
def rounded_clamped_swiglu(gate, up, gate_bias, up_bias, alpha, limit, dtype: tl.constexpr):
    """The same of clamped experts, see activation.py. NaN stays NaN."""
    gate = (gate.to(dtype).to(tl.float32) + gate_bias.to(tl.float32)).to(dtype).to(tl.float32)
    up = (up.to(dtype).to(tl.float32) + up_bias.to(tl.float32)).to(dtype).to(tl.float32)
    gate = tl.where(gate > limit, limit, gate)
    up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    scaled = (gate * alpha).to(dtype).to(tl.float32)
    weight = (1.0 / (1.0 + tl.exp(-scaled))).to(dtype).to(tl.float32)
    gate = (gate * weight).to(dtype).to(tl.float32)
    return ((up + 1.0).to(dtype).to(tl.float32) * gate).to(dtype)


@triton.jit
def _gate_up_tile(
    hidden, order, gate_up, bias, activated, expert, first, end, width, intermediate, alpha, limit, TOP_K: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, CLAMPED: tl.constexpr,
):  # fmt: skip
    dtype = hidden.dtype.element_ty
    places = first + tl.arange(0, ROWS)
    there = places < end
    token = (tl.load(order + places, there, other=0) // TOP_K).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    kept = columns < intermediate
    steps = tl.arange(0, DEPTH)
    rows = hidden + token[:, None] * width + steps[None, :]
    gates = gate_up + expert.to(tl.int64) * 2 * intermediate * width + steps[:, None]
    if CLAMPED:
        gates += columns[None, :] * 2 * width
        ups = gates + width
    else:
        gates += columns[None, :] * width
        ups = gates + intermediate * width
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, width, DEPTH):
        if EVEN:
            x, gate_tile, up_tile = tl.load(rows + start), tl.load(gates + start), tl.load(ups + start)
        else:
            inside = start + steps < width
            x = tl.load(rows + start, there[:, None] & inside[None, :], other=0.0)
            mask = inside[:, None] & kept[None, :]
            gate_tile, up_tile = tl.load(gates + start, mask, other=0.0), tl.load(ups + start, mask, other=0.0)
        gate = tl.dot(x, gate_tile, gate, input_precision="ieee")
        up = tl.dot(x, up_tile, up, input_precision="ieee")
    if CLAMPED:
        biases = bias + expert * 2 * intermediate + columns * 2
        gate_bias, up_bias = tl.load(biases, kept, other=0.0), tl.load(biases + 1, kept, other=0.0)
        value = rounded_clamped_swiglu(gate, up, gate_bias[None, :], up_bias[None, :], alpha, limit, dtype)
    else:
        value = rounded_swiglu(gate, up, dtype)
    target = activated + places[:, None].to(tl.int64) * intermediate + columns[None, :]
    tl.store(target, value, there[:, None] & kept[None, :])


@Kernel
@triton.jit
def _gate_up_kernel(
    hidden, order, ends, gate_up, bias, activated, num_experts, width, intermediate, alpha, limit, TOP_K: tl.constexpr,
    ROWS: tl.constexpr, TAIL: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EXPERTS: tl.constexpr,
    EVEN: tl.constexpr, CLAMPED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """SwiGLU of gathered rows; results stand in sorted order."""
    start_next(PDL)
    wait_for_previous(PDL)
    expert, first, end = tile_of(ends, tl.program_id(1), num_experts, ROWS, EXPERTS)
    if expert >= num_experts:
        return
    if TAIL < ROWS and end - first <= TAIL:
        _gate_up_tile(
            hidden, order, gate_up, bias, activated, expert, first, end, width, intermediate, alpha, limit, TOP_K, TAIL,
            COLUMNS, DEPTH, EVEN, CLAMPED,
        )  # fmt: skip
    else:
        _gate_up_tile(
            hidden, order, gate_up, bias, activated, expert, first, end, width, intermediate, alpha, limit, TOP_K, ROWS,
            COLUMNS, DEPTH, EVEN, CLAMPED,
        )  # fmt: skip


@triton.jit
def _down_tile(
    activated, order, down, bias, results, expert, first, end, width, intermediate, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    places = first + tl.arange(0, ROWS)
    there = places < end
    pair = tl.load(order + places, there, other=0).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    kept = columns < width
    steps = tl.arange(0, DEPTH)
    rows = activated + tl.where(there, places, first)[:, None].to(tl.int64) * intermediate + steps[None, :]
    weights = down + expert.to(tl.int64) * intermediate * width + columns[None, :] * intermediate + steps[:, None]
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, intermediate, DEPTH):
        if EVEN:
            x, tile = tl.load(rows + start), tl.load(weights + start)
        else:
            inside = start + steps < intermediate
            x = tl.load(rows + start, there[:, None] & inside[None, :], other=0.0)
            tile = tl.load(weights + start, inside[:, None] & kept[None, :], other=0.0)
        acc = tl.dot(x, tile, acc, input_precision="ieee")
    if BIASED:
        bias_row = tl.load(bias + expert * width + columns, kept, other=0.0).to(tl.float32)
        acc = acc.to(results.dtype.element_ty).to(tl.float32) + bias_row[None, :]
    target = results + pair[:, None] * width + columns[None, :]
    tl.store(target, acc.to(results.dtype.element_ty), there[:, None] & kept[None, :])


@Kernel
@triton.jit
def _down_kernel(
    activated, order, ends, down, bias, results, num_experts, width, intermediate, ROWS: tl.constexpr,
    TAIL: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EXPERTS: tl.constexpr, EVEN: tl.constexpr,
    BIASED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rows in sorted order to results in the order of pairs."""
    start_next(PDL)
    wait_for_previous(PDL)
    expert, first, end = tile_of(ends, tl.program_id(1), num_experts, ROWS, EXPERTS)
    if expert >= num_experts:
        return
    if TAIL < ROWS and end - first <= TAIL:
        _down_tile(
            activated, order, down, bias, results, expert, first, end, width, intermediate, TAIL, COLUMNS, DEPTH, EVEN,
            BIASED,
        )  # fmt: skip
    else:
        _down_tile(
            activated, order, down, bias, results, expert, first, end, width, intermediate, ROWS, COLUMNS, DEPTH, EVEN,
            BIASED,
        )  # fmt: skip


@dataclass(frozen=True)
class Tiling:
    """Tile sizes of a product, rows x columns x depth, with the warps and pipeline stages of a program. An expert's last
    tile has `tail` rows if they are enough."""

    rows: int
    tail: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


# By the mean number of tokens per expert, up to which they hold: tiles for gate_up and for down.
TILINGS: tuple[tuple[float, Tiling, Tiling], ...] = (
    (8, Tiling(16, 16, 64, 128, 4, 4), Tiling(16, 16, 128, 128, 4, 4)),
    (24, Tiling(32, 32, 64, 128, 4, 3), Tiling(32, 32, 128, 128, 4, 3)),
    (96, Tiling(64, 64, 64, 64, 4, 3), Tiling(64, 64, 128, 64, 4, 3)),
    (float("inf"), Tiling(128, 32, 128, 64, 8, 4), Tiling(128, 32, 256, 64, 8, 4)),
)
FLOAT32_TILING = Tiling(32, 16, 32, 32, 4, 2)


def tilings_for(num_pairs: int, num_experts: int, dtype: torch.dtype) -> tuple[Tiling, Tiling]:
    if dtype == torch.float32:
        return FLOAT32_TILING, FLOAT32_TILING
    gate_up, down = next(tilings for most, *tilings in TILINGS if num_pairs / num_experts <= most)
    return gate_up, down


def experts_triton(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    first: int = 0,
    num_experts: int | None = None,
    tilings: tuple[Tiling, Tiling] | None = None,
    clamped: ClampedExperts | None = None,
) -> torch.Tensor:
    """An `ExpertsFunction`, see experts.py, of the experts from `first` on of `num_experts`, which share the tokens.
    `tilings` is for measurements."""
    (num_tokens, top_k), (num_local, width, intermediate) = ids.shape, down.shape
    num_pairs = num_tokens * top_k
    order, ends = sort_by_expert(ids, num_local, first)
    activated = hidden.new_empty(num_pairs, intermediate)
    results = hidden.new_empty(num_pairs, width)
    up_tiling, down_tiling = tilings or tilings_for(num_pairs, num_experts or num_local, hidden.dtype)
    sizes = (num_local, width, intermediate)
    options = launch_options(hidden.device)
    up_bias, down_bias, alpha, limit = clamp_arguments(clamped, hidden)
    experts = power_of_2_from(num_local)
    _gate_up_kernel[(ceil_div(intermediate, up_tiling.columns), num_tiles(num_pairs, num_local, up_tiling))](
        hidden, order, ends, gate_up, up_bias, activated, *sizes, alpha, limit, TOP_K=top_k, EXPERTS=experts,
        EVEN=width % up_tiling.depth == 0 and intermediate % up_tiling.columns == 0, CLAMPED=clamped is not None,
        **launch_tiles(up_tiling), **options,
    )  # fmt: skip
    _down_kernel[(ceil_div(width, down_tiling.columns), num_tiles(num_pairs, num_local, down_tiling))](
        activated, order, ends, down, down_bias, results, *sizes, EXPERTS=experts,
        EVEN=intermediate % down_tiling.depth == 0 and width % down_tiling.columns == 0, BIASED=clamped is not None,
        **launch_tiles(down_tiling), **options,
    )  # fmt: skip
    return combine_pairs(results, ids, weights, num_local, first)


def clamp_arguments(
    clamped: ClampedExperts | None, unused: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """What kernels take of clamped experts: biases, alpha and limit."""
    if clamped is None:
        return unused, unused, 0.0, 0.0
    return clamped.gate_up_bias, clamped.down_bias, clamped.clamp.alpha, clamped.clamp.limit


def num_tiles(num_pairs: int, num_experts: int, tiling: Tiling) -> int:
    """The most tiles that there can be: every expert may leave one unfilled."""
    return min(num_pairs, num_pairs // tiling.rows + num_experts)


def launch_tiles(tiling: Tiling) -> dict[str, int]:
    return {
        "ROWS": tiling.rows,
        "TAIL": tiling.tail,
        "COLUMNS": tiling.columns,
        "DEPTH": tiling.depth,
        "num_warps": tiling.num_warps,
        "num_stages": tiling.num_stages,
    }
