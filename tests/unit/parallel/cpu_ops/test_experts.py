"""The experts in C++ on every instruction set: against the definition, and that a token knows nothing of the others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from waybill.parallel.collectives import sum_of_terms
from waybill.parallel.cpu_ops.attention import has_native_attention
from waybill.parallel.cpu_ops.experts import ExpertsSplit, NativeClamp, experts_native
from waybill.parallel.moe.activation import ClampedExperts, SwigluClamp
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


def test_a_token_has_the_same_bits_among_many() -> None:
    """More than a cache has room for, than are packed at once, and than tiles take in a turn."""
    hidden, ids, weights, gate_up, down = problem(1100, 2, 2, 1056, 544, seed=2)
    together = experts_native(hidden, ids, weights, gate_up, down)
    for token in (0, 15, 16, 511, 512, 777, 1098, 1099):
        alone = slice(token, token + 1)
        found = experts_native(hidden[alone], ids[alone], weights[alone], gate_up, down)
        assert torch.equal(found, together[alone]), token


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_token_that_is_not_finite_stays_alone(value: float) -> None:
    hidden, ids, weights, gate_up, down = problem(21, 3, 3, 32, 32, seed=2)
    expected = experts_native(hidden, ids, weights, gate_up, down)
    hidden[4] = value
    found, others = experts_native(hidden, ids, weights, gate_up, down), [row for row in range(21) if row != 4]
    assert not found[4].isfinite().any()
    assert torch.equal(found[others], expected[others])


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(2, 2), (6, 2), (8, 2), (8, 4)])
def test_one_rank_has_the_bits_of_several(num_experts: int, num_ranks: int) -> None:
    """Experts spread over ranks; ids count from a rank's first."""
    hidden, ids, weights, gate_up, down = problem(50, num_experts, 2, 64, 32, seed=3)
    whole, size = experts_native(hidden, ids, weights, gate_up, down), num_experts // num_ranks
    terms = torch.stack(
        [
            experts_native(
                hidden,
                ids - first,
                weights,
                gate_up[first : first + size],
                down[first : first + size],
                split=ExpertsSplit(num_ranks),
            )
            for first in range(0, num_experts, size)
        ]
    )
    assert terms.dtype == torch.float32
    assert torch.equal(sum_of_terms(terms).bfloat16(), whole)


@pytest.mark.parametrize("is_clamped", [False, True])
@pytest.mark.parametrize(("width", "num_ranks"), [(40, 2), (32, 4), (24, 2)])
def test_one_rank_has_the_bits_of_several_that_have_slices(width: int, num_ranks: int, is_clamped: bool) -> None:
    hidden, ids, weights, gate_up, down = problem(50, 3, 2, 64, width, seed=4)
    clamp = clamp_of(3, 64, width) if is_clamped else None
    whole = experts_native(hidden, ids, weights, gate_up, down, split=ExpertsSplit(1, has_whole=False), clamp=clamp)
    terms = []
    for rank, columns in enumerate(torch.arange(width).chunk(num_ranks)):
        own = (
            (2 * columns[:, None] + torch.arange(2)).flatten() if is_clamped else torch.cat((columns, width + columns))
        )
        mine = None
        if clamp is not None:
            down_bias = clamp.down_bias if rank == 0 else torch.zeros_like(clamp.down_bias)
            mine = replace(clamp, gate_up_bias=clamp.gate_up_bias[:, own], down_bias=down_bias)
        split = ExpertsSplit(num_ranks, has_whole=False)
        terms.append(
            experts_native(hidden, ids, weights, gate_up[:, own], down[:, :, columns], split=split, clamp=mine)
        )
    assert torch.equal(sum_of_terms(torch.stack(terms)).bfloat16(), whole)
    expected = experts_torch_reference(
        hidden, ids, weights, gate_up, down, clamped=None if clamp is None else clamped_of(clamp)
    )
    assert_close(whole, expected)


@pytest.mark.parametrize("width", [32, 8])
def test_clamped_experts_are_those_of_the_definition(width: int) -> None:
    """Numbers beyond the clamp's bounds, and NaN, are among them."""
    hidden, ids, weights, gate_up, down = problem(30, 3, 2, 64, width, seed=5)
    hidden[3] *= 50
    clamp = clamp_of(3, 64, width)
    found = experts_native(hidden, ids, weights.float(), gate_up, down, clamp=clamp)
    assert_close(found, experts_torch_reference(hidden, ids, weights, gate_up, down, clamped=clamped_of(clamp)))
    hidden[7] = torch.nan
    again = experts_native(hidden, ids, weights.float(), gate_up, down, clamp=clamp)
    others = [row for row in range(30) if row != 7]
    assert again[7].isnan().all() and torch.equal(again[others], found[others])


def clamp_of(num_experts: int, hidden: int, width: int) -> NativeClamp:
    generator = torch.Generator().manual_seed(6)
    biases = (torch.randn(num_experts, size, generator=generator).bfloat16() for size in (2 * width, hidden))
    return NativeClamp(*biases, 1.702, 1.0)


def clamped_of(clamp: NativeClamp) -> ClampedExperts:
    return ClampedExperts(clamp.gate_up_bias, clamp.down_bias, SwigluClamp(clamp.alpha, clamp.limit))


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-6 * expected.float().abs().max().item())
