"""The experts in C++ on every instruction set: against the definition, and that a token knows nothing of the others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from waybill.parallel.cpu_ops.attention import has_native_attention
from waybill.parallel.cpu_ops.experts import experts_native
from waybill.parallel.moe.experts import experts_torch_reference

pytestmark = pytest.mark.skipif(not has_native_attention(), reason="needs AVX2 and a C++ compiler")


def problem(
    num_tokens: int, num_experts: int, top_k: int, hidden: int, width: int, seed: int
) -> tuple[torch.Tensor, ...]:
    """Ids go one beyond both ends: those are of other ranks."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    ids = torch.rand(num_tokens, num_experts + 2, generator=generator).argsort(dim=1)[:, :top_k] - 1
    weights = torch.rand(num_tokens, top_k, generator=generator).bfloat16()
    scale = hidden**-0.5
    gate_up, down = normal(num_experts, 2 * width, hidden) * scale, normal(num_experts, hidden, width) * width**-0.5
    return normal(num_tokens, hidden), ids, weights, gate_up, down


@settings(max_examples=40, deadline=None)
@given(
    num_tokens=st.integers(0, 40),
    num_experts=st.integers(1, 5),
    top_k=st.integers(1, 3),
    hidden=st.sampled_from([32, 96, 160]),
    width=st.sampled_from([32, 64, 224]),
    seed=st.integers(0, 99),
)
def test_the_definition_within_rounding(
    num_tokens: int, num_experts: int, top_k: int, hidden: int, width: int, seed: int
) -> None:
    """A sum in another order may round to the other side, before the activation as behind it."""
    arguments = problem(num_tokens, num_experts, top_k, hidden, width, seed)
    found, expected = experts_native(*arguments), experts_torch_reference(*arguments)
    scale = expected.float().abs().max().item() if num_tokens else 0.0
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-6 * scale)


def test_a_token_has_the_same_bits_in_any_batch_and_with_any_threads() -> None:
    hidden, ids, weights, gate_up, down = problem(90, 4, 2, 96, 64, seed=1)
    together, threads = experts_native(hidden, ids, weights, gate_up, down), torch.get_num_threads()
    try:
        for num_threads, size in ((1, 1), (2, 2), (3, 7), (1, 41)):
            torch.set_num_threads(num_threads)
            parts = [
                experts_native(*(x.contiguous() for x in part), gate_up, down)
                for part in zip(hidden.split(size), ids.split(size), weights.split(size), strict=True)
            ]
            assert torch.equal(torch.cat(parts), together), (num_threads, size)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_token_that_is_not_finite_stays_alone(value: float) -> None:
    hidden, ids, weights, gate_up, down = problem(21, 3, 3, 32, 32, seed=2)
    expected = experts_native(hidden, ids, weights, gate_up, down)
    hidden[4] = value
    found, others = experts_native(hidden, ids, weights, gate_up, down), [row for row in range(21) if row != 4]
    assert not found[4].isfinite().any()
    assert torch.equal(found[others], expected[others])


@pytest.mark.parametrize("num_experts", [2, 6])
def test_one_rank_has_the_bits_of_two(num_experts: int) -> None:
    """Experts spread over ranks; ids count from a rank's first."""
    hidden, ids, weights, gate_up, down = problem(50, num_experts, 2, 64, 32, seed=3)
    whole, half = experts_native(hidden, ids, weights, gate_up, down), num_experts // 2
    terms = [
        experts_native(hidden, ids - first, weights, gate_up[first:last], down[first:last], num_ranks=2)
        for first, last in ((0, half), (half, num_experts))
    ]
    assert all(term.dtype == torch.float32 for term in terms)
    assert torch.equal((terms[0] + terms[1]).bfloat16(), whole)
