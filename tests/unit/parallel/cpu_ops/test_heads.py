"""Products of each head's rows in C++: against float64, and that rows know nothing of each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from waybill.parallel.cpu_ops.heads import absorb_native, extract_native, has_native_heads

pytestmark = pytest.mark.skipif(
    not has_native_heads(torch.empty(0, dtype=torch.bfloat16)), reason="needs AVX2 and a C++ compiler"
)


@settings(max_examples=40, deadline=None)
@given(
    num_tokens=st.integers(0, 9),
    num_heads=st.integers(1, 3),
    rows=st.integers(1, 40),
    columns=st.sampled_from([1, 15, 32, 64, 70, 130]),
    seed=st.integers(0, 99),
)
def test_the_product_is_exact_within_rounding(
    num_tokens: int, num_heads: int, rows: int, columns: int, seed: int
) -> None:
    """Matrices that stand between others, as a projection's keys and values do."""
    generator = torch.Generator().manual_seed(seed)
    around = torch.randn(num_heads, rows + 3, columns, generator=generator).bfloat16()
    matrices = around[:, 1 : rows + 1]
    queries = torch.randn(num_heads, num_tokens, rows, generator=generator).bfloat16().transpose(0, 1)
    latents = torch.randn(num_tokens, num_heads, columns + 5, generator=generator).bfloat16()[..., :columns]
    for function, x, equation in (
        (absorb_native, queries, "thr,hrc->thc"),
        (extract_native, latents, "thc,hrc->thr"),
    ):
        found, exact = function(x, matrices), torch.einsum(equation, x.double(), matrices.double())
        sizes = torch.einsum(equation, x.double().abs(), matrices.double().abs())
        assert found.dtype == torch.bfloat16 and found.shape == exact.shape
        assert ((found.double() - exact).abs() <= 2**-8 * exact.abs() + 2**-17 * sizes).all()


def test_a_row_has_the_same_bits_in_any_batch_and_with_any_threads() -> None:
    matrices, threads = torch.randn(3, 24, 70).bfloat16(), torch.get_num_threads()
    queries, latents = torch.randn(40, 3, 24).bfloat16(), torch.randn(40, 3, 70).bfloat16()
    try:
        for function, x in ((absorb_native, queries), (extract_native, latents)):
            together = function(x, matrices)
            for num_threads, size in ((1, 1), (2, 3), (1, 7), (3, 38)):
                torch.set_num_threads(num_threads)
                assert torch.equal(torch.cat([function(part, matrices) for part in x.split(size)]), together)
    finally:
        torch.set_num_threads(threads)


def test_what_is_not_finite_stays_in_its_row() -> None:
    matrices, x = torch.randn(2, 8, 33).bfloat16(), torch.randn(6, 2, 8).bfloat16()
    expected = absorb_native(x, matrices)
    x[3, 1] = torch.inf
    found = absorb_native(x, matrices)
    assert not found[3, 1].isfinite().any()
    expected[3, 1] = found[3, 1]
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
