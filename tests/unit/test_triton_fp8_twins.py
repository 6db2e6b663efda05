"""Triton kernels of block FP8 against their torch twins: compiled where there is a GPU, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
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
from waybill.parallel.fp8_triton import linear_fp8_triton, quantise_tokens_triton, rows_of_heads_triton
from waybill.parallel.mesh import Axis
from waybill.parallel.moe import experts_fp8_triton as experts_fp8_module
from waybill.parallel.moe.experts import Experts, experts_by_group
from waybill.parallel.moe.experts_fp8_triton import experts_fp8_triton
from waybill.parallel.weight_format import Fp8Format

TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}


@pytest.fixture(autouse=True)
def activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in the interpreter have theirs from torch: see `test_activations`."""
    if DEVICE.type == "cpu":
        for module in (fp8_triton, experts_fp8_module):
            monkeypatch.setattr(module, "quantise_tokens_triton", quantise_tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "columns"), [(256, 128), (200, 64), (40, 32), (3000, 128)])
def test_activations(dtype: torch.dtype, width: int, columns: int) -> None:
    x = normal(5, width, dtype=dtype)
    x[1], x[2, 3] = 0.0, 300.0
    expected, found = quantise_tokens(x, columns), quantise_tokens_triton(x, columns)
    given, wanted = found[0].float(), expected[0].float()
    if DEVICE.type == "cpu":
        # The interpreter of Triton 3.6 loses the carry where a number is rounded up to a power of two.
        given = torch.where(given * 2 == wanted, wanted, given)
    assert torch.equal(given, wanted)
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
@pytest.mark.parametrize(("num_tokens", "grid"), [(1, Grid()), (20, Grid(64, 32)), (70, Grid(32, 128))])
def test_linear(dtype: torch.dtype, quantises: bool, biased: bool, num_tokens: int, grid: Grid) -> None:
    x, weight = normal(num_tokens, 200, dtype=dtype), normal(150, 200, dtype=torch.float32, seed=1) / 14
    bias = normal(150, dtype=dtype, seed=2) if biased else None
    matrix = quantise_blocks(weight, grid)
    expected = linear_fp8_torch(x, *matrix, grid, bias, quantises=quantises)
    found = linear_fp8_triton(x, *matrix, grid, bias, quantises=quantises)
    torch.testing.assert_close(found, expected, **TOLERANCE[dtype])


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
    found = experts_fp8_triton(x, ids, weights, *stacks, first=first, num_experts=num_experts)
    for matrix in stacks:
        matrix._product = linear_fp8_torch
    expected = experts_by_group(x, torch.where(ids < 0, -1, ids - first), weights, *stacks)
    torch.testing.assert_close(found, expected, **TOLERANCE[dtype])
