"""Twins of `quantise_tokens` and `linear_fp8_torch` in fp8.py as kernels, and the step that every product of such numbers
is made of: a group of columns at a time, summed in float32 with both scales (DeepSeek-AI 2024).

Legend: T tokens, R rows and C columns of a matrix, G the columns of a grid.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .fp8 import E4M3, MAX_E4M3, MIN_AMAX, Grid
from .triton_launch import Kernel, ceil_div, launch_options, power_of_2_from, start_next, wait_for_previous

# Groups that a program quantises.
GROUPS = 16
# Up to so many tokens the smallest tile will do.
FEW_TOKENS = 16


@Kernel
@triton.jit
def _quantise_tokens_kernel(
    x, data, scales, width, num_groups, MAX: tl.constexpr, MIN: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    start_next(PDL)
    wait_for_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    columns = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = columns < width
    values = tl.load(x + token * width + columns, inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(values), axis=1)
    # Maxima pass NaN over: here a group with one, or with an infinite number, is NaN as a whole.
    is_bad = tl.max((values != values).to(tl.int32), axis=1) + (largest == float("inf")).to(tl.int32)
    scale = tl.where(is_bad > 0, float("nan"), tl.div_rn(tl.maximum(largest, MIN), MAX))
    values = tl.minimum(tl.maximum(tl.div_rn(values, tl.broadcast_to(scale[:, None], values.shape)), -MAX), MAX)
    tl.store(data + token * width + columns, values.to(data.dtype.element_ty), inside)
    tl.store(scales + token * num_groups + groups, scale, groups < num_groups)


def quantise_tokens_triton(x: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See `quantise_tokens`; what is not finite leaves nothing but NaN of its group, here by its scale."""
    num_tokens, width = x.shape
    num_groups = ceil_div(width, columns)
    data = torch.empty(num_tokens, width, dtype=E4M3, device=x.device)
    scales = torch.empty(num_tokens, num_groups, device=x.device)
    groups = min(GROUPS, power_of_2_from(num_groups))
    if num_tokens:
        _quantise_tokens_kernel[(num_tokens, ceil_div(num_groups, groups))](
            x, data, scales, width, num_groups, MAX=MAX_E4M3, MIN=MIN_AMAX, GROUPS=groups, GROUP=columns, num_warps=4,
            **launch_options(x.device),
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
def add_product(acc, x, weight, x_scale, weight_scale, EXACT: tl.constexpr):
    """`acc` [T, R] and the product of a group of columns: x [T, G], whose scale is [T] unless it is exact, and e4m3 [G, R],
    whose scale is [R]."""
    if EXACT:
        return acc + tl.dot(x, weight.to(x.dtype), input_precision="ieee") * weight_scale[None, :]
    else:
        return acc + tl.dot(x, weight) * (x_scale[:, None] * weight_scale[None, :])


@Kernel
@triton.jit
def _linear_kernel(
    x, x_scales, weight, scales, bias, out, num_tokens, num_outputs, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    GRID_ROWS: tl.constexpr, GROUP: tl.constexpr, EXACT: tl.constexpr, BIASED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    start_next(PDL)
    tokens = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there, kept, steps = tokens < num_tokens, columns < num_outputs, tl.arange(0, GROUP)
    num_groups = tl.cdiv(width, GROUP)
    weights = weight + columns[None, :].to(tl.int64) * width + steps[:, None]
    weight_scales = scales + (columns // GRID_ROWS) * num_groups
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    x_scale = tl.zeros((ROWS,), tl.float32)
    wait_for_previous(PDL)
    for group in range(0, num_groups):
        inside = group * GROUP + steps < width
        where = tokens[:, None] * width + group * GROUP + steps[None, :]
        rows = tl.load(x + where, there[:, None] & inside[None, :], other=0.0)
        tile = tl.load(weights + group * GROUP, inside[:, None] & kept[None, :], other=0.0)
        if not EXACT:
            x_scale = tl.load(x_scales + tokens * num_groups + group, there, other=0.0)
        acc = add_product(acc, rows, tile, x_scale, tl.load(weight_scales + group, kept, other=0.0), EXACT)
    if BIASED:
        acc = (
            acc.to(out.dtype.element_ty).to(tl.float32)
            + tl.load(bias + columns, kept, other=0.0).to(tl.float32)[None, :]
        )
    where = out + tokens[:, None] * num_outputs + columns[None, :]
    tl.store(where, acc.to(out.dtype.element_ty), there[:, None] & kept[None, :])


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
    seen, x_scales = quantise_tokens_triton(x, grid.columns) if quantises else (x, scales)
    rows, columns, num_warps = (16, 32, 4) if num_tokens <= FEW_TOKENS else (64, 128, 4)
    _linear_kernel[(ceil_div(num_outputs, columns), ceil_div(num_tokens, rows))](
        seen, x_scales, data, scales, out if bias is None else bias, out, num_tokens, num_outputs, width, ROWS=rows,
        COLUMNS=columns, GRID_ROWS=grid.rows, GROUP=grid.columns, EXACT=not quantises, BIASED=bias is not None,
        num_warps=num_warps, num_stages=3, **launch_options(x.device),
    )  # fmt: skip
    return out
