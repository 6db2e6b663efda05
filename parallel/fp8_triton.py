"""Twins of `quantise_tokens` and `linear_fp8_torch` in fp8.py as kernels, and the step that every product of such numbers
is made of: a group of columns at a time, summed in float32 with both scales (DeepSeek-AI 2024).

Legend: T tokens, R rows and C columns of a matrix, G the columns of a grid.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from .fp8 import BLOCK, E4M3, MAX_E4M3, MIN_AMAX, Grid
from .triton_launch import HOPPER, Kernel, ceil_div, launch_options, power_of_2_from, start_next, wait_for_previous

# Groups that a program quantises.
GROUPS = 16
# What the library's products ask for: whole blocks of the weight, its scales and tokens in so many. With other numbers of
# scales cuBLAS gives wrong results.
LIBRARY_MULTIPLE = 4
# By the number of tokens, up to which they hold: rows x columns of a tile, with the warps and pipeline stages of a program.
TILINGS: tuple[tuple[float, int, int, int, int], ...] = (
    (16, 16, 32, 4, 5),
    (64, 64, 32, 4, 5),
    (256, 64, 64, 4, 4),
    (float("inf"), 128, 64, 8, 3),
)
# Numbers of the weight that a program of one token holds.
FEW_TILE = 8192


@triton.jit
def quantise_group(values, MAX: tl.constexpr, MIN: tl.constexpr, dtype: tl.constexpr):
    """Rows [n, G] -> e4m3 and their scales [n]; a row with what is not finite is NaN as a whole, by its scale. The
    interpreter of Triton 3.6 loses the carry where a number is rounded up to a power of two."""
    values = values.to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(values), axis=1), MIN)
    # Maxima pass NaN over.
    spoilt = tl.sum(values * 0.0, axis=1)
    inverse = tl.div_rn(tl.full(largest.shape, MAX, tl.float32), largest)
    scaled = tl.minimum(tl.maximum(values * inverse[:, None], -MAX), MAX)
    return scaled.to(dtype), tl.div_rn(largest, tl.full(largest.shape, MAX, tl.float32)) + spoilt


@Kernel
@triton.jit
def _quantise_tokens_kernel(
    x, data, scales, num_rows, width, num_groups, MAX: tl.constexpr, MIN: tl.constexpr, GROUPS: tl.constexpr,
    GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    start_next(PDL)
    wait_for_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    columns = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = columns < width
    values = tl.load(x + token * width + columns, inside, other=0.0)
    values, scale = quantise_group(values, MAX, MIN, data.dtype.element_ty)
    tl.store(data + token * width + columns, values, inside)
    tl.store(scales + groups * num_rows + token, scale, groups < num_groups)


def quantise_tokens_triton(x: torch.Tensor, columns: int, multiple: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """See `quantise_tokens`; there are rows of no token up to a `multiple`, and the scales of a group of columns stand side
    by side, as the library wants them. What is not finite leaves nothing but NaN of its group, here by its scale."""
    num_tokens, width = x.shape
    num_rows = ceil_div(num_tokens, multiple) * multiple
    num_groups = ceil_div(width, columns)
    data = torch.empty(num_rows, width, dtype=E4M3, device=x.device)
    scales = torch.empty(num_groups, num_rows, device=x.device).t()
    groups = min(GROUPS, power_of_2_from(num_groups))
    if num_tokens:
        _quantise_tokens_kernel[(num_tokens, ceil_div(num_groups, groups))](
            x, data, scales, num_rows, width, num_groups, MAX=MAX_E4M3, MIN=MIN_AMAX, GROUPS=groups, GROUP=columns,
            num_warps=4, **launch_options(x.device),
        )  # fmt: skip
    return data, scales


@Kernel
@triton.jit
def _rows_of_heads_kernel(
    data, scales, out, first, num_rows, num_columns, num_groups, WIDTH: tl.constexpr, GRID_ROWS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    start_next(PDL)
    place = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    kept = columns < num_columns
    row = place // num_rows * WIDTH + first + place % num_rows
    values = tl.load(data + row * num_columns + columns, kept, other=0.0).to(tl.float32)
    scale = tl.load(scales + row // GRID_ROWS * num_groups + columns // GROUP, kept, other=0.0)
    # Weights are no kernel's result; what is written may still be read by one ahead.
    wait_for_previous(PDL)
    tl.store(out + place * num_columns + columns, (values * scale).to(out.dtype.element_ty), kept)


def rows_of_heads_triton(
    data: torch.Tensor, scales: torch.Tensor, grid: Grid, width: int, part: slice, dtype: torch.dtype
) -> torch.Tensor:
    """See `rows_of_heads_torch`; each number is read once, and no others."""
    (total, num_columns), num_rows = data.shape, part.stop - part.start
    out = torch.empty(total // width, num_rows, num_columns, dtype=dtype, device=data.device)
    block = min(1024, power_of_2_from(num_columns))
    _rows_of_heads_kernel[(total // width * num_rows, ceil_div(num_columns, block))](
        data, scales, out, part.start, num_rows, num_columns, scales.shape[1], WIDTH=width, GRID_ROWS=grid.rows,
        GROUP=grid.columns, BLOCK=block, num_warps=4, **launch_options(data.device),
    )  # fmt: skip
    return out


@triton.jit
def scale_rows(rows, first, GRID_ROWS: tl.constexpr, ONE_SCALE: tl.constexpr):
    """Where the scales of a tile's rows of the weight stand, [R], or that of all of them, which begin at `first`."""
    if ONE_SCALE:
        return first // GRID_ROWS
    else:
        return rows // GRID_ROWS


@triton.jit
def add_product(acc, x, weight, x_scale, weight_scales, kept, EXACT: tl.constexpr, ONE_SCALE: tl.constexpr):
    """`acc` [T, R] and the product of a group of columns: x [T, G], whose scale is [T] unless it is exact, and e4m3 [G, R],
    whose scales are at the pointers `weight_scales` [R], or the one of all at a single one."""
    if ONE_SCALE:
        weight_scale = tl.load(weight_scales)
        if EXACT:
            return acc + tl.dot(x, weight.to(x.dtype), input_precision="ieee") * weight_scale
        else:
            return acc + tl.dot(x, weight) * (x_scale * weight_scale)[:, None]
    else:
        weight_scale = tl.load(weight_scales, kept, other=0.0)
        if EXACT:
            return acc + tl.dot(x, weight.to(x.dtype), input_precision="ieee") * weight_scale[None, :]
        else:
            return acc + tl.dot(x, weight) * (x_scale[:, None] * weight_scale[None, :])


@Kernel
@triton.jit
def _linear_kernel(
    x, x_scales, weight, scales, bias, out, num_tokens, num_outputs, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    GRID_ROWS: tl.constexpr, GROUP: tl.constexpr, EXACT: tl.constexpr, ONE_SCALE: tl.constexpr, BIASED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    start_next(PDL)
    tokens = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there, kept, steps = tokens < num_tokens, columns < num_outputs, tl.arange(0, GROUP)
    num_groups = tl.cdiv(width, GROUP)
    weights = weight + columns[None, :].to(tl.int64) * width + steps[:, None]
    weight_scales = scales + scale_rows(columns, tl.program_id(0) * COLUMNS, GRID_ROWS, ONE_SCALE) * num_groups
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    x_scale = tl.zeros((ROWS,), tl.float32)
    wait_for_previous(PDL)
    for group in range(0, num_groups):
        inside = group * GROUP + steps < width
        where = tokens[:, None] * width + group * GROUP + steps[None, :]
        rows = tl.load(x + where, there[:, None] & inside[None, :], other=0.0)
        tile = tl.load(weights + group * GROUP, inside[:, None] & kept[None, :], other=0.0)
        if not EXACT:
            x_scale = tl.load(x_scales + group * num_tokens + tokens, there, other=0.0)
        acc = add_product(acc, rows, tile, x_scale, weight_scales + group, kept, EXACT, ONE_SCALE)
    if BIASED:
        acc = (
            acc.to(out.dtype.element_ty).to(tl.float32)
            + tl.load(bias + columns, kept, other=0.0).to(tl.float32)[None, :]
        )
    where = out + tokens[:, None] * num_outputs + columns[None, :]
    tl.store(where, acc.to(out.dtype.element_ty), there[:, None] & kept[None, :])


def rows_of_tile(width: int) -> int:
    """How many rows of so many numbers a program of few tokens holds."""
    return max(1, FEW_TILE // width)


@triton.jit
def row_in_groups(x, first, width, groups, steps, QUANTISES: tl.constexpr, MAX: tl.constexpr, MIN: tl.constexpr,
                  dtype: tl.constexpr):  # fmt: skip
    """A token's numbers from `first` on by group, in float32 [n, G], and what to multiply their products by, [n]."""
    where = groups[:, None] * steps.shape[0] + steps[None, :]
    values = tl.load(x + first + where, where < width, other=0.0)
    scale = tl.full(groups.shape, 1.0, tl.float32)
    if QUANTISES:
        values, scale = quantise_group(values, MAX, MIN, dtype)
    return values.to(tl.float32), scale


@Kernel
@triton.jit
def _matvec_fp8_kernel(
    x, weight, scales, out, num_outputs, width, num_groups, COLUMNS: tl.constexpr, GROUPS: tl.constexpr,
    GRID_ROWS: tl.constexpr, GROUP: tl.constexpr, QUANTISES: tl.constexpr, MAX: tl.constexpr, MIN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One token: a program holds some rows of the weight whole, loaded before the kernel ahead is done."""
    start_next(PDL)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    groups, steps = tl.arange(0, GROUPS), tl.arange(0, GROUP)
    kept = columns < num_outputs
    where = groups[:, None] * GROUP + steps[None, :]
    mask = kept[:, None, None] & (where < width)[None, :, :]
    tile = tl.load(weight + columns[:, None, None].to(tl.int64) * width + where[None, :, :], mask, other=0.0)
    where = columns[:, None] // GRID_ROWS * num_groups + groups[None, :]
    scale = tl.load(scales + where, kept[:, None] & (groups < num_groups)[None, :], other=0.0)
    wait_for_previous(PDL)
    row, row_scale = row_in_groups(x, 0, width, groups, steps, QUANTISES, MAX, MIN, weight.dtype.element_ty)
    sums = tl.sum(tile.to(tl.float32) * row[None, :, :], axis=2)
    value = tl.sum(sums * (scale * row_scale[None, :]), axis=1)
    tl.store(out + columns, value.to(out.dtype.element_ty), kept)


def has_library_product(x: torch.Tensor, data: torch.Tensor, grid: Grid) -> bool:
    """Whether torch multiplies such numbers (cuBLAS, scales of 1 x 128 and 128 x 128; on Hopper alone)."""
    num_rows, num_columns = data.shape
    is_whole = num_rows % BLOCK == 0 and num_columns % (LIBRARY_MULTIPLE * BLOCK) == 0
    return is_whole and x.is_cuda and x.dtype == torch.bfloat16 and grid == Grid() and is_hopper(x.device)


@cache
def is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[:1] == HOPPER[:1]


def linear_fp8_triton(
    x: torch.Tensor,
    data: torch.Tensor,
    scales: torch.Tensor,
    grid: Grid,
    bias: torch.Tensor | None,
    *,
    quantises: bool = False,
) -> torch.Tensor:
    """See `linear_fp8_torch`; with `quantises` activations are e4m3, too."""
    (num_tokens, width), num_outputs = x.shape, data.shape[0]
    out = x.new_empty(num_tokens, num_outputs)
    if num_tokens == 0:
        return out
    x = x.contiguous()
    num_groups = power_of_2_from(scales.shape[1])
    columns = rows_of_tile(num_groups * grid.columns)
    if num_tokens == 1 and bias is None:
        _matvec_fp8_kernel[(ceil_div(num_outputs, columns),)](
            x, data, scales, out, num_outputs, width, scales.shape[1], COLUMNS=columns, GROUPS=num_groups,
            GRID_ROWS=grid.rows, GROUP=grid.columns, QUANTISES=quantises, MAX=MAX_E4M3, MIN=MIN_AMAX, num_warps=4,
            **launch_options(x.device),
        )  # fmt: skip
        return out
    if quantises and has_library_product(x, data, grid):
        seen, x_scales = quantise_tokens_triton(x, grid.columns, LIBRARY_MULTIPLE)
        product = torch._scaled_mm(seen, data.t(), x_scales, scales.t(), out_dtype=x.dtype)[:num_tokens]
        return product if bias is None else product + bias
    seen, x_scales = quantise_tokens_triton(x, grid.columns) if quantises else (x, scales)
    rows, columns, num_warps, num_stages = next(tiling for most, *tiling in TILINGS if num_tokens <= most)
    _linear_kernel[(ceil_div(num_outputs, columns), ceil_div(num_tokens, rows))](
        seen, x_scales, data, scales, out if bias is None else bias, out, num_tokens, num_outputs, width, ROWS=rows,
        COLUMNS=columns, GRID_ROWS=grid.rows, GROUP=grid.columns, EXACT=not quantises,
        ONE_SCALE=grid.rows % columns == 0, BIASED=bias is not None, num_warps=num_warps, num_stages=num_stages,
        **launch_options(x.device),
    )  # fmt: skip
    return out
