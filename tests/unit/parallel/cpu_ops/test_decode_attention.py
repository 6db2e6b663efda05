"""Attention of decodes in C++: against the definition in float64, and that requests know nothing of each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from waybill.engine.attention import sdpa
from waybill.engine.attention.backend import AttentionRule
from waybill.engine.attention.sdpa import prefill, prefill_in_order
from waybill.engine.attention.sdpa_plan import Prefill
from waybill.parallel.cpu_ops.decode_attention import decode_native, has_native_decode

pytestmark = pytest.mark.skipif(not has_native_decode(), reason="needs AVX2 and a C++ compiler")


def problem(lengths: list[int], num_kv_heads: int, num_shared: int, width: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Query, keys, values, rows, slots and lengths; rows and slots are in no order, and slots beyond a length hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    num_reqs, num_keys = len(lengths), max(lengths)
    num_slots = num_reqs * num_keys + 1
    query = torch.randn(num_reqs, num_kv_heads * num_shared, width, generator=generator).bfloat16()
    keys, values = (torch.randn(num_slots, num_kv_heads, width, generator=generator).bfloat16() for _ in range(2))
    slots = torch.randperm(num_slots - 1, generator=generator).view(num_reqs, num_keys)
    for i, length in enumerate(lengths):
        slots[i, length:] = num_slots - 1
    keys[-1], values[-1] = torch.nan, torch.nan
    return query, keys, values, torch.randperm(num_reqs, generator=generator), slots, torch.tensor(lengths)


def exact(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """Of one request: query [H, d], keys and values [n, G, d]."""
    num_shared = len(query) // keys.shape[1]
    wide_keys, wide_values = (x.double().repeat_interleave(num_shared, dim=1) for x in (keys, values))
    weights = (torch.einsum("hd,khd->hk", query.double(), wide_keys) * scale).softmax(dim=-1)
    return torch.einsum("hk,khd->hd", weights, wide_values)


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    num_kv_heads=st.integers(1, 3),
    num_shared=st.integers(1, 6),
    width=st.sampled_from([8, 16, 40, 64, 72, 128]),
    seed=st.integers(0, 99),
)
def test_the_definition_within_rounding(
    lengths: list[int], num_kv_heads: int, num_shared: int, width: int, seed: int
) -> None:
    """Rounded once to bfloat16, 2**-8 of the result; sums in float32 are far closer."""
    query, keys, values, rows, slots, counts = problem(lengths, num_kv_heads, num_shared, width, seed)
    scale = width**-0.5
    found = decode_native(query, keys, values, rows, slots, counts, scale)
    for i, length in enumerate(lengths):
        own = slots[i, :length]
        expected = exact(query[rows[i]], keys[own], values[own], scale)
        torch.testing.assert_close(found[i].double(), expected, rtol=2**-8, atol=1e-5)


def test_a_request_has_the_same_bits_alone_and_in_any_batch() -> None:
    query, keys, values, rows, slots, lengths = problem([5, 64, 33, 1, 70, 70, 12], 2, 3, 64, seed=1)
    threads = torch.get_num_threads()
    together = decode_native(query, keys, values, rows, slots, lengths, 0.125)
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            for i, length in enumerate(lengths.tolist()):
                one = slice(i, i + 1)
                alone = decode_native(query, keys, values, rows[one], slots[one, :length], lengths[one], 0.125)
                assert torch.equal(alone[0], together[i])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_with_its_request(value: float) -> None:
    query, keys, values, rows, slots, lengths = problem([9, 20, 30], 1, 2, 32, seed=2)
    expected = decode_native(query, keys, values, rows, slots, lengths, 0.2)
    keys[slots[1, 3]], values[slots[1, 7]] = value, value
    found = decode_native(query, keys, values, rows, slots, lengths, 0.2)
    assert not found[1].isfinite().all()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


def test_a_token_of_a_prompt_has_the_same_bits_however_the_prompt_is_cut() -> None:
    """All at once, in chunks and as decodes, and within rounding what torch's fused attention gives."""
    num_keys, width, rule = 45, 32, AttentionRule(0.2, None, None)
    query, keys, values, _, slots, _ = problem([num_keys], 2, 3, width, seed=3)
    query = torch.randn(num_keys, 6, width).bfloat16()
    kv, own = {"k": keys, "v": values}, slots[0]
    whole = prefill_in_order(query, kv, Prefill(0, num_keys, own), rule)
    for size in (1, 7, 20):
        parts = [
            prefill_in_order(rows, kv, Prefill(0, len(rows), own[: first + len(rows)]), rule)
            for first, rows in zip(range(0, num_keys, size), query.split(size), strict=True)
        ]
        assert torch.equal(torch.cat(parts), whole)
    torch.testing.assert_close(whole, prefill(query, kv, Prefill(0, num_keys, own), rule), rtol=2**-6, atol=2**-6)


def test_tokens_that_see_many_keys_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    num_keys, width, rule = 45, 32, AttentionRule(0.2, None, None)
    _, keys, values, _, slots, _ = problem([num_keys], 2, 3, width, seed=4)
    query, kv, own = torch.randn(30, 6, width).bfloat16(), {"k": keys, "v": values}, slots[0]
    request = Prefill(0, 30, own)
    in_order, by_torch = prefill_in_order(query, kv, request, rule), prefill(query, kv, request, rule)
    for limit, count in ((45, 30), (25, 10), (15, 0), (3, 0)):
        monkeypatch.setattr(sdpa, "MAX_KEYS_IN_ORDER", limit)
        found = prefill_in_order(query, kv, request, rule)
        assert torch.equal(found[:count], in_order[:count])
        torch.testing.assert_close(found[count:], by_torch[count:], rtol=2**-6, atol=2**-6)
