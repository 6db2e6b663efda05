"""The norms in C++ against those in torch, and that a row's bits depend on nothing but the row and the weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from waybill.engine.models.norm_rope import NativeLayerOps, TorchLayerOps
from waybill.parallel.cpu_ops.rms_norm import (
    add_rms_norm_native,
    has_native_rms_norm,
    rms_norm_native,
    sums_of_squares_native,
)

pytestmark = pytest.mark.skipif(not has_native_rms_norm(), reason="needs AVX2 and a C++ compiler")
TORCH, EPS = TorchLayerOps(), 1e-6


def integers(*shape: int, seed: int) -> torch.Tensor:
    """Whose squares add up exactly in float32, in any order."""
    return torch.randint(-16, 17, shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@settings(max_examples=60, deadline=None)
@given(num_tokens=st.integers(0, 40), width=st.integers(1, 300), seed=st.integers(0, 99))
def test_where_sums_are_exact_every_bit_is_that_of_torch(num_tokens: int, width: int, seed: int) -> None:
    x, residual = integers(num_tokens, width, seed=seed), integers(num_tokens, width, seed=seed + 1)
    wide = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    for weight in (wide.bfloat16(), wide):
        assert torch.equal(rms_norm_native(x, weight, EPS), TORCH.rms_norm(x, weight, EPS))
        found, expected = (f(x, residual, weight, EPS) for f in (add_rms_norm_native, TORCH.add_rms_norm))
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("width", [7, 64, 1024, 1030])
def test_random_rows_are_those_of_torch_but_for_the_order_of_their_sums(width: int) -> None:
    """A sum in another order may round a normed value to the other side: by its last bit, 2**-7 of it at most."""
    torch.manual_seed(width)
    x, residual, weight = (
        torch.randn(70, width).bfloat16(),
        torch.randn(70, width).bfloat16(),
        torch.randn(width).bfloat16(),
    )
    together, total = add_rms_norm_native(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(together, TORCH.rms_norm(total, weight, EPS), rtol=2**-7, atol=0.0)
    for rows in (slice(0, 1), slice(3, 9), slice(69, 70)):
        assert torch.equal(add_rms_norm_native(x[rows], residual[rows], weight, EPS)[0], together[rows])
        assert torch.equal(rms_norm_native(total[rows], weight, EPS), together[rows])


@pytest.mark.parametrize(("width", "num_parts"), [(64, 4), (20, 2), (7, 1), (200, 4)])
def test_sums_of_squares(width: int, num_parts: int) -> None:
    x = torch.randn(9, width + 5).bfloat16()[:, 3 : width + 3]
    found = sums_of_squares_native(x, num_parts)
    torch.testing.assert_close(found, x.float().pow(2).unflatten(1, (num_parts, -1)).sum(2))
    assert torch.equal(torch.cat([sums_of_squares_native(row[None], num_parts) for row in x]), found)
    halves = [sums_of_squares_native(part, 1) for part in x.chunk(num_parts, 1)]
    assert torch.equal(torch.cat(halves, 1), found)


def test_heads_and_rows_may_be_further_apart_than_they_are_long() -> None:
    heads, weight = torch.randn(5, 8, 24).bfloat16(), torch.randn(24).bfloat16()
    part = heads[:, 2:5]
    expected = torch.stack([rms_norm_native(part[:, h].contiguous(), weight, EPS) for h in range(3)], dim=1)
    assert torch.equal(rms_norm_native(part, weight, EPS), expected)
    assert torch.equal(rms_norm_native(heads[:, 3], weight, EPS), expected[:, 1])
    assert torch.equal(rms_norm_native(part[:, 0].t().contiguous().t(), weight, EPS), expected[:, 0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_goes_where_torch_has_it(value: float) -> None:
    x, residual, weight = torch.randn(4, 40).bfloat16(), torch.randn(4, 40).bfloat16(), torch.randn(40).bfloat16()
    x[1, 39], residual[2, 0] = value, value
    found, expected = (f(x, residual, weight, EPS) for f in (add_rms_norm_native, TORCH.add_rms_norm))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.isnan(), other.isnan()) and torch.equal(one.isinf(), other.isinf())
    assert found[0][[0, 3]].isfinite().all()


def test_a_weight_in_float32_is_torchs_work() -> None:
    x, weight = torch.randn(3, 32).bfloat16(), torch.randn(32)
    ops = NativeLayerOps()
    assert torch.equal(ops.rms_norm(x, weight, EPS), TORCH.rms_norm(x, weight, EPS))
    for one, other in zip(ops.add_rms_norm(x, x, weight, EPS), TORCH.add_rms_norm(x, x, weight, EPS), strict=True):
        assert torch.equal(one, other)
