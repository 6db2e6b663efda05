"""Triton kernels of block FP8 against their torch twins: compiled where there is a GPU, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl
from support.triton_twins import DEVICE, DTYPES, normal

from waybill.parallel import fp8_triton
from waybill.parallel.fp8 import (
    Grid,
    dequantise,
    linear_fp8_torch,
    quantise_blocks,
    quantise_tokens,
    rows_of_heads_torch,
)
from waybill.parallel.fp8_split_triton import SplitTiling, linear_fp8_by_rows, linear_fp8_split, split_tiling
from waybill.parallel.fp8_triton import linear_fp8_triton, quantise_tokens_triton, rows_of_heads_triton
from waybill.parallel.mesh import Axis
from waybill.parallel.moe import experts_few_fp8_triton as experts_few_fp8_triton_module
from waybill.parallel.moe.experts import MAX_FEW_TOKENS, Experts, experts_by_group
from waybill.parallel.moe.experts_few_fp8_triton import experts_few_fp8_triton
from waybill.parallel.moe.experts_fp8_triton import experts_fp8_triton
from waybill.parallel.weight_format import Fp8Format

# In 16 bits the twins round the dequantised weights, too.
TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.bfloat16: {"rtol": 2e-2, "atol": 5e-2}}
# Matrix units add up products of e4m3 numbers with some 14 bits; and where a number between two products is rounded to
# another in 16 bits, it may be another in e4m3.
QUANTISED = {torch.float32: {"rtol": 2e-3, "atol": 2e-3}, torch.bfloat16: {"rtol": 2e-2, "atol": 1e-1}}


def tolerance(dtype: torch.dtype, *, quantises: bool) -> dict[str, float]:
    return (QUANTISED if quantises and DEVICE.type == "cuda" else TOLERANCE)[dtype]


@triton.jit
def quantise_group_with_carry(values, MAX: tl.constexpr, MIN: tl.constexpr, dtype: tl.constexpr):
    """`quantise_group`, whose numbers are rounded before they are converted."""
    values = values.to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(values), axis=1), MIN)
    spoilt = tl.sum(values * 0.0, axis=1)
    most = tl.full(largest.shape, MAX, tl.float32)
    scaled = tl.minimum(tl.maximum(values * tl.div_rn(most, largest)[:, None], -MAX), MAX)
    bits = scaled.to(tl.int32, bitcast=True)
    # To the nearest of three binary places, even if there are two; below 2^-6 to multiples of 2^-9.
    rounded = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    rounded = tl.where(tl.abs(scaled) < 2.0**-6, (scaled + 24576.0) - 24576.0, rounded)
    return rounded.to(dtype), tl.div_rn(largest, most) + spoilt


@pytest.fixture(autouse=True)
def activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the interpreter loses, see `quantise_group`."""
    if DEVICE.type == "cpu":
        for module in (fp8_triton, experts_few_fp8_triton_module):
            monkeypatch.setattr(module, "quantise_group", quantise_group_with_carry)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "columns"), [(256, 128), (200, 64), (40, 32), (3000, 128)])
def test_activations(dtype: torch.dtype, width: int, columns: int) -> None:
    x = normal(5, width, dtype=dtype)
    x[1], x[2, 3] = 0.0, 300.0
    expected, found = quantise_tokens(x, columns), quantise_tokens_triton(x, columns)
    assert torch.equal(found[0].float(), expected[0].float())
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0)


def test_what_is_not_finite_spoils_its_group_and_no_other() -> None:
    """A chunk of a prompt is judged by what NaN has reached."""
    x = normal(4, 256, dtype=torch.float32)
    x[1, 5], x[2, 130], x[3] = float("nan"), float("inf"), float("nan")
    for quantise in (quantise_tokens, quantise_tokens_triton):
        seen = dequantise(*quantise(x, 128), Grid(1, 128))
        spoilt = seen.isnan().view(4, 2, 128).all(dim=2)
        assert spoilt.tolist() == [[False, False], [True, False], [False, True], [True, True]]
        assert seen.isnan().view(4, 2, 128).any(dim=2).sum() == 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", [slice(0, 40), slice(40, 72)])
@pytest.mark.parametrize("grid", [Grid(), Grid(8, 64)])
def test_rows_of_heads(dtype: torch.dtype, part: slice, grid: Grid) -> None:
    """Of three heads of 72 rows; blocks do not end where heads do."""
    matrix = quantise_blocks(normal(3 * 72, 200, dtype=torch.float32), grid)
    expected = rows_of_heads_torch(*matrix, grid, 72, part, dtype)
    assert expected.shape == (3, part.stop - part.start, 200)
    assert torch.equal(rows_of_heads_triton(*matrix, grid, 72, part, dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantises", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "grid"), [(1, Grid()), (1, Grid(8, 32)), (20, Grid(64, 32)), (70, Grid(32, 128)), (300, Grid())]
)
def test_linear(dtype: torch.dtype, quantises: bool, biased: bool, num_tokens: int, grid: Grid) -> None:
    x, weight = normal(num_tokens, 200, dtype=dtype), normal(150, 200, dtype=torch.float32, seed=1) / 14
    bias = normal(150, dtype=dtype, seed=2) if biased else None
    matrix = quantise_blocks(weight, grid)
    expected = linear_fp8_torch(x, *matrix, grid, bias, quantises=quantises)
    found = linear_fp8_triton(x, *matrix, grid, bias, quantises=quantises)
    torch.testing.assert_close(found, expected, **tolerance(dtype, quantises=quantises))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantises", [False, True])
@pytest.mark.parametrize("num_tokens", [2, 70])
def test_linear_of_whole_blocks(dtype: torch.dtype, quantises: bool, num_tokens: int) -> None:
    """Whose product is the library's, in 16 bits on a GPU."""
    x, weight = normal(num_tokens, 1024, dtype=dtype), normal(256, 1024, dtype=torch.float32, seed=1) / 32
    # Blocks of different scales.
    weight *= torch.arange(1, 17, device=DEVICE).view(2, 8).repeat_interleave(128, 0).repeat_interleave(128, 1) / 8
    matrix = quantise_blocks(weight)
    expected = linear_fp8_torch(x, *matrix, Grid(), None, quantises=quantises)
    found = linear_fp8_triton(x, *matrix, Grid(), None, quantises=quantises)
    torch.testing.assert_close(found, expected, **tolerance(dtype, quantises=quantises))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "num_outputs", "width", "grid"),
    [
        (2, 64, 1024, Grid()),
        (64, 128, 640, Grid()),
        (70, 96, 512, Grid(64, 64)),
        (20, 150, 200, Grid(8, 32)),
    ],
)
def test_linear_split_over_programs(
    dtype: torch.dtype, biased: bool, num_tokens: int, num_outputs: int, width: int, grid: Grid
) -> None:
    """Twice, so that the second finds what the first has left of its counts; tiles and groups may not be whole."""
    x, weight = normal(num_tokens, width, dtype=dtype), normal(num_outputs, width, dtype=torch.float32, seed=1) / 30
    bias = normal(num_outputs, dtype=dtype, seed=2) if biased else None
    matrix = quantise_blocks(weight, grid)
    expected = linear_fp8_torch(x, *matrix, grid, bias, quantises=True)
    for num_splits in (1, 3, 4):
        tiling = SplitTiling(16 if num_tokens <= 16 else 64, 32, num_splits)
        found = [linear_fp8_split(x, *matrix, grid, bias, tiling) for _ in range(2)]
        torch.testing.assert_close(found[0], expected, **tolerance(dtype, quantises=True))
        assert torch.equal(found[0], found[1])
    chosen = linear_fp8_by_rows(x, *matrix, grid, bias, quantises=True)
    torch.testing.assert_close(chosen, expected, **tolerance(dtype, quantises=True))


def test_tilings_of_split_products() -> None:
    """Tokens, rows and groups of columns of the weight: those that were measured, and one that is too short to split."""
    assert split_tiling(8, 2048, 32) == SplitTiling(16, 64, 8, num_stages=3)
    assert split_tiling(16, 5120, 16) == SplitTiling(16, 32, 4, num_stages=3)
    assert split_tiling(64, 2048, 32) == SplitTiling(64, 64, 8, num_stages=4)
    assert split_tiling(33, 5120, 16) == SplitTiling(64, 64, 2, num_stages=4)
    assert split_tiling(2, 2048, 3).num_splits == split_tiling(64, 2048, 3).num_splits == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantises", [False, True])
@pytest.mark.parametrize(("split", "rank", "width"), [("ep", 1, 96), ("tp", 1, 192), ("tp", 0, 128)])
@pytest.mark.parametrize("num_tokens", [3, 40])
def test_experts(dtype: torch.dtype, quantises: bool, split: str, rank: int, width: int, num_tokens: int) -> None:
    """Of one rank of two, which holds some experts, or slices that cut blocks; padding is nobody's work."""
    hidden, num_experts, top_k = 160, 6, 2
    weight_format = Fp8Format(dtype, DEVICE, quantises)
    layer = Experts(
        num_experts,
        hidden,
        width,
        Axis("ep", rank, 2, None, (0, 1)),
        split=split,
        backend="fast",
        weight_format=weight_format,
    )
    layer.fused_weight("gate_up").load(normal(num_experts, 2 * width, hidden, dtype=torch.float32) / 12)
    layer.fused_weight("down").load(normal(num_experts, hidden, width, dtype=torch.float32, seed=1) / 12)
    x, weights = normal(num_tokens, hidden, dtype=dtype, seed=2), normal(num_tokens, top_k, dtype=dtype, seed=3)
    ids = (torch.arange(num_tokens * top_k).view(num_tokens, top_k) * 5 % num_experts).to(DEVICE)
    ids[1] = -1
    first = 3 if split == "ep" else 0
    stacks = layer.gate_up.stored, layer.down.stored
    found = [experts_fp8_triton(x, ids, weights, *stacks, first=first, num_experts=num_experts)]
    if num_tokens <= MAX_FEW_TOKENS:
        found.append(experts_few_fp8_triton(x, ids, weights, *stacks, first=first))
    for matrix in stacks:
        matrix._product = linear_fp8_torch
    expected = experts_by_group(x, torch.where(ids < 0, -1, ids - first), weights, *stacks)
    for each in found:
        torch.testing.assert_close(each, expected, **tolerance(dtype, quantises=quantises))
