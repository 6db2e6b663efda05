"""Products of few rows in block FP8, in Triton: the columns of a weight that is long and narrow are split over programs, so
that all of the device reads it (split-K). The last program of a tile sums what all have of it, in their order, so that
the same rows give the same bits.

Legend: T tokens, R rows and C columns of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from .fp8 import BLOCK, Grid
from .fp8_triton import add_product, linear_fp8_triton, quantise_tokens_triton, scale_rows
from .triton_launch import Kernel, ceil_div, fetch, launch_options, power_of_2_from, start_next, wait_for_previous

# Beyond these one program a tile keeps the device busy. Up to the few there is a tiling of their own.
MAX_ROWS, FEW_ROWS = 64, 16
# Of more rows than a few: programs that keep the device busy.
WANTED_PROGRAMS = 160
# Groups of columns that a program should have, and programs that share a tile at most.
MIN_GROUPS, MAX_SPLITS = 4, 8
# Tiles of a product.
MAX_TILES = 8192


@dataclass(frozen=True)
class SplitTiling:
    """Rows x columns of a tile, programs that share one, and the warps and pipeline stages of each."""

    rows: int
    columns: int
    num_splits: int
    num_warps: int = 4
    num_stages: int = 3


@Kernel
@triton.jit
def _split_kernel(
    x, x_scales, weight, scales, bias, out, partial, counts, num_tokens, num_outputs, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, NUM_SPLITS: tl.constexpr, GRID_ROWS: tl.constexpr, GROUP: tl.constexpr,
    ONE_SCALE: tl.constexpr, WHOLE: tl.constexpr, BIASED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    start_next(PDL)
    split = tl.program_id(1)
    tokens = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there, kept, steps = tokens < num_tokens, columns < num_outputs, tl.arange(0, GROUP)
    num_groups = tl.cdiv(width, GROUP)
    per_split = tl.cdiv(num_groups, NUM_SPLITS)
    first = split * per_split
    end = tl.minimum(first + per_split, num_groups)
    weights = weight + columns[None, :].to(tl.int64) * width + steps[:, None]
    if WHOLE:
        begin = tl.minimum(first, num_groups - 1) * GROUP
        fetch(weight + columns.to(tl.int64) * width + begin, tl.maximum(end - first, 1) * GROUP, PDL)
    weight_scales = scales + scale_rows(columns, tl.program_id(0) * COLUMNS, GRID_ROWS, ONE_SCALE) * num_groups
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    wait_for_previous(PDL)
    for group in range(first, end):
        where = x + tokens[:, None].to(tl.int64) * width + group * GROUP + steps[None, :]
        if WHOLE:
            rows = tl.load(where, there[:, None], other=0.0)
            tile = tl.load(weights + group * GROUP)
        else:
            inside = group * GROUP + steps < width
            rows = tl.load(where, there[:, None] & inside[None, :], other=0.0)
            tile = tl.load(weights + group * GROUP, inside[:, None] & kept[None, :], other=0.0)
        x_scale = tl.load(x_scales + group * num_tokens + tokens, there, other=0.0)
        acc = add_product(acc, rows, tile, x_scale, weight_scales + group, kept, False, ONE_SCALE)
    target = out + tokens[:, None].to(tl.int64) * num_outputs + columns[None, :]
    mask = there[:, None] & kept[None, :]
    is_last = True
    if NUM_SPLITS > 1:
        tile_number = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        place = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        parts = partial + tile_number.to(tl.int64) * NUM_SPLITS * ROWS * COLUMNS + place
        tl.store(parts + split * ROWS * COLUMNS, acc)
        # All threads' stores are before what one of them says.
        tl.debug_barrier()
        is_last = tl.atomic_add(counts + tile_number, 1, sem="acq_rel") == NUM_SPLITS - 1
        if is_last:
            acc = tl.zeros((ROWS, COLUMNS), tl.float32)
            for number in tl.static_range(NUM_SPLITS):
                acc += tl.load(parts + number * ROWS * COLUMNS, cache_modifier=".cg")
            tl.store(counts + tile_number, 0)
    if is_last:
        if BIASED:
            acc = acc.to(out.dtype.element_ty).to(tl.float32)
            acc += tl.load(bias + columns, kept, other=0.0).to(tl.float32)[None, :]
        tl.store(target, acc.to(out.dtype.element_ty), mask)


@cache
def _counts(device: torch.device) -> torch.Tensor:
    """How many programs are done with each tile; whoever is the last leaves zero."""
    return torch.zeros(MAX_TILES, dtype=torch.int32, device=device)


def split_tiling(num_tokens: int, num_outputs: int, num_groups: int) -> SplitTiling:
    """For a product of so many tokens with a weight of so many rows and groups of columns. Measured on an H100, with 2,048
    rows by 4,096 columns and 5,120 by 2,048."""
    most_splits = max(1, num_groups // MIN_GROUPS)
    if num_tokens <= FEW_ROWS:
        columns = 64 if num_outputs < num_groups * BLOCK else 32
        return SplitTiling(FEW_ROWS, columns, min(MAX_SPLITS, most_splits), num_stages=3)
    num_splits = power_of_2_from(max(1, WANTED_PROGRAMS // ceil_div(num_outputs, 64)))
    return SplitTiling(power_of_2_from(num_tokens), 64, min(num_splits, most_splits), num_stages=4)


def linear_fp8_split(
    x: torch.Tensor,
    data: torch.Tensor,
    scales: torch.Tensor,
    grid: Grid,
    bias: torch.Tensor | None,
    tiling: SplitTiling | None = None,
) -> torch.Tensor:
    """See `linear_fp8_torch`, of activations that are quantised here. `tiling` is for measurements and tests."""
    (num_tokens, width), num_outputs = x.shape, data.shape[0]
    seen, x_scales = quantise_tokens_triton(x.contiguous(), grid.columns)
    out = x.new_empty(num_tokens, num_outputs)
    tiling = tiling or split_tiling(num_tokens, num_outputs, scales.shape[1])
    shape = ceil_div(num_outputs, tiling.columns), tiling.num_splits, ceil_div(num_tokens, tiling.rows)
    partial = out
    if tiling.num_splits > 1:
        assert shape[0] * shape[2] <= MAX_TILES
        partial = out.new_empty(*shape, tiling.rows, tiling.columns, dtype=torch.float32)
    _split_kernel[shape](
        seen, x_scales, data, scales, out if bias is None else bias, out, partial, _counts(x.device), num_tokens,
        num_outputs, width, ROWS=tiling.rows, COLUMNS=tiling.columns, NUM_SPLITS=tiling.num_splits, GRID_ROWS=grid.rows,
        GROUP=grid.columns, ONE_SCALE=grid.rows % tiling.columns == 0,
        WHOLE=width % grid.columns == 0 and num_outputs % tiling.columns == 0, BIASED=bias is not None,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages, **launch_options(x.device),
    )  # fmt: skip
    return out


def linear_fp8_by_rows(
    x: torch.Tensor,
    data: torch.Tensor,
    scales: torch.Tensor,
    grid: Grid,
    bias: torch.Tensor | None,
    *,
    quantises: bool = False,
) -> torch.Tensor:
    """See `linear_fp8_torch`; a few rows through the kernel above."""
    if quantises and 1 < x.shape[0] <= MAX_ROWS:
        return linear_fp8_split(x, data, scales, grid, bias)
    return linear_fp8_triton(x, data, scales, grid, bias, quantises=quantises)
