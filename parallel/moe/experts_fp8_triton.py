"""Experts in block FP8, in Triton: the kernels of experts_triton.py with a scale for every group of columns. Tokens are
sorted by expert, and results combined, by the kernels of expert_order_triton.py.

Legend: T tokens, D hidden, F experts on this rank, K experts per token, I intermediate width on this rank, P = T * K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..fp8_triton import add_product, quantise_tokens_triton, scale_rows
from ..triton_launch import Kernel, ceil_div, launch_options, power_of_2_from, start_next, wait_for_previous
from ..weight_format import Fp8Matrix
from .expert_order_triton import combine_pairs, sort_by_expert, tile_of
from .experts_triton import Tiling, launch_tiles, num_tiles, rounded_swiglu

# By the mean number of tokens per expert, up to which they hold: tiles for gate_up and for down. The depth is the grid's.
TILINGS: tuple[tuple[float, Tiling, Tiling], ...] = (
    (8, Tiling(16, 16, 64, 0, 4, 3), Tiling(16, 16, 128, 0, 4, 3)),
    (24, Tiling(16, 16, 64, 0, 4, 3), Tiling(16, 16, 128, 0, 8, 3)),
    (96, Tiling(64, 64, 64, 0, 4, 4), Tiling(64, 64, 128, 0, 4, 3)),
    (float("inf"), Tiling(128, 128, 128, 0, 8, 3), Tiling(64, 64, 128, 0, 4, 3)),
)


@Kernel
@triton.jit
def _gate_up_kernel(
    hidden, x_scales, order, ends, gate_up, scales, activated, num_rows, num_experts, width, intermediate,
    TOP_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EXPERTS: tl.constexpr, GRID_ROWS: tl.constexpr,
    GROUP: tl.constexpr, EXACT: tl.constexpr, ONE_SCALE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """SwiGLU of gathered rows; results stand in sorted order."""
    start_next(PDL)
    wait_for_previous(PDL)
    expert, first, end = tile_of(ends, tl.program_id(1), num_experts, ROWS, EXPERTS)
    if expert >= num_experts:
        return
    places = first + tl.arange(0, ROWS)
    there = places < end
    token = (tl.load(order + places, there, other=0) // TOP_K).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    kept, steps = columns < intermediate, tl.arange(0, GROUP)
    num_groups, num_blocks = tl.cdiv(width, GROUP), tl.cdiv(2 * intermediate, GRID_ROWS)
    gates = gate_up + expert.to(tl.int64) * 2 * intermediate * width + columns[None, :] * width + steps[:, None]
    first_row = tl.program_id(0) * COLUMNS
    scales += expert * num_blocks * num_groups
    gate_scales = scales + scale_rows(columns, first_row, GRID_ROWS, ONE_SCALE) * num_groups
    up_scales = scales + scale_rows(columns + intermediate, first_row + intermediate, GRID_ROWS, ONE_SCALE) * num_groups
    gate, up = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    x_scale = tl.zeros((ROWS,), tl.float32)
    for group in range(0, num_groups):
        inside = group * GROUP + steps < width
        where = token[:, None] * width + group * GROUP + steps[None, :]
        x = tl.load(hidden + where, there[:, None] & inside[None, :], other=0.0)
        if not EXACT:
            x_scale = tl.load(x_scales + group * num_rows + token, there, other=0.0)
        mask = inside[:, None] & kept[None, :]
        tile = tl.load(gates + group * GROUP, mask, other=0.0)
        gate = add_product(gate, x, tile, x_scale, gate_scales + group, kept, EXACT, ONE_SCALE)
        tile = tl.load(gates + intermediate * width + group * GROUP, mask, other=0.0)
        up = add_product(up, x, tile, x_scale, up_scales + group, kept, EXACT, ONE_SCALE)
    target = activated + places[:, None].to(tl.int64) * intermediate + columns[None, :]
    tl.store(target, rounded_swiglu(gate, up, activated.dtype.element_ty), there[:, None] & kept[None, :])


@Kernel
@triton.jit
def _down_kernel(
    activated, x_scales, order, ends, down, scales, results, num_rows, num_experts, width, intermediate, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, EXPERTS: tl.constexpr, GRID_ROWS: tl.constexpr, GROUP: tl.constexpr, EXACT: tl.constexpr,
    ONE_SCALE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rows in sorted order to results in the order of pairs."""
    start_next(PDL)
    wait_for_previous(PDL)
    expert, first, end = tile_of(ends, tl.program_id(1), num_experts, ROWS, EXPERTS)
    if expert >= num_experts:
        return
    places = first + tl.arange(0, ROWS)
    there = places < end
    pair = tl.load(order + places, there, other=0).to(tl.int64)
    rows = tl.where(there, places, first).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    kept, steps = columns < width, tl.arange(0, GROUP)
    num_groups, num_blocks = tl.cdiv(intermediate, GROUP), tl.cdiv(width, GRID_ROWS)
    weights = down + expert.to(tl.int64) * intermediate * width + columns[None, :] * intermediate + steps[:, None]
    scales += expert * num_blocks * num_groups
    weight_scales = scales + scale_rows(columns, tl.program_id(0) * COLUMNS, GRID_ROWS, ONE_SCALE) * num_groups
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    x_scale = tl.zeros((ROWS,), tl.float32)
    for group in range(0, num_groups):
        inside = group * GROUP + steps < intermediate
        where = rows[:, None] * intermediate + group * GROUP + steps[None, :]
        x = tl.load(activated + where, there[:, None] & inside[None, :], other=0.0)
        if not EXACT:
            x_scale = tl.load(x_scales + group * num_rows + rows, there, other=0.0)
        tile = tl.load(weights + group * GROUP, inside[:, None] & kept[None, :], other=0.0)
        acc = add_product(acc, x, tile, x_scale, weight_scales + group, kept, EXACT, ONE_SCALE)
    target = results + pair[:, None] * width + columns[None, :]
    tl.store(target, acc.to(results.dtype.element_ty), there[:, None] & kept[None, :])


def experts_fp8_triton(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: Fp8Matrix,
    down: Fp8Matrix,
    *,
    first: int = 0,
    num_experts: int | None = None,
) -> torch.Tensor:
    """An `ExpertsFunction`, see experts.py, of the experts from `first` on of `num_experts`, which share the tokens."""
    (num_tokens, top_k), (num_local, width, intermediate) = ids.shape, down.data.shape
    num_pairs, options = num_tokens * top_k, launch_options(hidden.device)
    up_tiling, down_tiling = next(
        tilings for most, *tilings in TILINGS if num_pairs / (num_experts or num_local) <= most
    )
    order, ends = sort_by_expert(ids, num_local, first)
    activated, results = hidden.new_empty(num_pairs, intermediate), hidden.new_empty(num_pairs, width)
    sizes, experts = (num_local, width, intermediate), power_of_2_from(num_local)
    hidden = hidden.contiguous()
    x, x_scales = _seen(hidden, gate_up)
    _gate_up_kernel[(ceil_div(intermediate, up_tiling.columns), num_tiles(num_pairs, num_local, up_tiling))](
        x, x_scales, order, ends, gate_up.data, gate_up.scales, activated, num_tokens, *sizes, TOP_K=top_k, EXPERTS=experts,
        GRID_ROWS=gate_up.grid.rows, GROUP=gate_up.grid.columns, EXACT=not gate_up.quantises,
        ONE_SCALE=gate_up.grid.rows % up_tiling.columns == 0 and intermediate % up_tiling.columns == 0,
        **launch_fp8(up_tiling), **options,
    )  # fmt: skip
    x, x_scales = _seen(activated, down)
    _down_kernel[(ceil_div(width, down_tiling.columns), num_tiles(num_pairs, num_local, down_tiling))](
        x, x_scales, order, ends, down.data, down.scales, results, num_pairs, *sizes, EXPERTS=experts,
        GRID_ROWS=down.grid.rows, GROUP=down.grid.columns, EXACT=not down.quantises,
        ONE_SCALE=down.grid.rows % down_tiling.columns == 0, **launch_fp8(down_tiling), **options,
    )  # fmt: skip
    return combine_pairs(results, ids, weights, num_local, first)


def _seen(x: torch.Tensor, matrix: Fp8Matrix) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations as a kernel reads them, and their scales, if they have any. Quantising them in the products themselves
    costs more than this kernel: every program would do it again."""
    return quantise_tokens_triton(x, matrix.grid.columns) if matrix.quantises else (x, matrix.scales)


def launch_fp8(tiling: Tiling) -> dict[str, int]:
    """The depth and the last tile's rows are not a matter of choice here."""
    options = launch_tiles(tiling)
    del options["DEPTH"], options["TAIL"]
    return options
