"""Instruction sets against each other: AVX-512 and AVX2 give the same bits, and so do two kinds of machines."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from waybill.parallel.cpu_ops import library
from waybill.parallel.cpu_ops.attention import Pages, attention_native
from waybill.parallel.cpu_ops.experts import experts_native
from waybill.parallel.cpu_ops.linear import linear_native
from waybill.parallel.cpu_ops.rms_norm import add_rms_norm_native

pytestmark = pytest.mark.skipif(
    not {"avx512", "avx2"} <= set(library.supported_sets()), reason="needs AVX-512 and AVX2"
)
On = Callable[[str, Callable[[], torch.Tensor]], torch.Tensor]


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> On:
    """What a function gives with one instruction set."""

    def run(name: str, function: Callable[[], torch.Tensor]) -> torch.Tensor:
        monkeypatch.setenv(library.SWITCH, name)
        return function()

    return run


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).bfloat16()


def assert_same(on: On, function: Callable[[], torch.Tensor]) -> None:
    """NaN in the same places, and the same bits otherwise."""
    torch.testing.assert_close(on("avx512", function), on("avx2", function), rtol=0.0, atol=0.0, equal_nan=True)


def test_linear(on: On) -> None:
    for num_tokens, width in ((1, 64), (9, 77), (100, 1000)):
        x, weight, bias = normal(num_tokens, width), normal(37, width), normal(37)
        x[0, 3] = torch.inf
        assert_same(on, lambda x=x, weight=weight, bias=bias: linear_native(x, weight, bias))


def test_experts(on: On) -> None:
    """Activations far from zero are among them."""
    hidden, gate_up, down = normal(50, 64) * 4, normal(3, 128, 64), normal(3, 64, 64)
    ids, weights = torch.randint(0, 3, (50, 2)), torch.rand(50, 2).bfloat16()
    assert_same(on, lambda: experts_native(hidden, ids, weights, gate_up, down))


def test_norms(on: On) -> None:
    x, residual, weight = normal(30, 130), normal(30, 130), normal(130)
    x[3, 5] = torch.nan
    assert_same(on, lambda: torch.cat(add_rms_norm_native(x, residual, weight, 1e-6)))


def test_attention(on: On) -> None:
    """Scores far from zero are among them."""
    query, keys, values = normal(91, 8, 40) * 4, normal(200, 2, 40), normal(200, 2, 40)
    rows = torch.tensor([[0, 1], [1, 90], [100, 200]])
    pages = Pages(torch.stack([torch.randperm(200), torch.randperm(200)]).int(), rows, 1)
    for window in (None, 50):
        assert_same(on, lambda window=window: attention_native(query, keys, values, pages, 0.3, window))
