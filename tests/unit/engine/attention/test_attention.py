"""The fast attention against its slow twin, and a batch against its requests alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from waybill.engine.attention import make_attention_backend
from waybill.engine.attention.backend import AttentionBatch, AttentionRule

HEADS, KV_HEADS, WIDTH = 4, 2, 16


def make_case(lengths: list[tuple[int, int]], page_size: int, seed: int) -> tuple[AttentionBatch, list[torch.Tensor]]:
    """Requests of (new tokens, cached tokens) on pages in random order."""
    generator = torch.Generator().manual_seed(seed)
    q_lens = [new for new, _ in lengths]
    kv_lens = [new + cached for new, cached in lengths]
    per_req = [-(-n // page_size) for n in kv_lens]
    order = torch.randperm(sum(per_req), generator=generator).to(torch.int32)
    table = torch.zeros(len(lengths), max(per_req), dtype=torch.int32)
    first = 0
    for i, n in enumerate(per_req):
        table[i, :n] = order[first : first + n]
        first += n
    num_slots = sum(per_req) * page_size
    query = torch.randn(sum(q_lens), HEADS, WIDTH, generator=generator)
    keys = torch.randn(num_slots, KV_HEADS, WIDTH, generator=generator)
    values = torch.randn(num_slots, KV_HEADS, WIDTH, generator=generator)
    return AttentionBatch(q_lens, kv_lens, table, torch.arange(len(lengths)), page_size), [query, keys, values]


PLAIN = AttentionRule(WIDTH**-0.5)
RULES = {
    "plain": PLAIN,
    "window": AttentionRule(0.3, 5),
    "sinks": AttentionRule(0.3, None, torch.tensor([2.0, -1.0, 0.5, 3.0])),
    "both": AttentionRule(0.3, 3, torch.tensor([2.0, -1.0, 0.5, 3.0])),
}


def run(name: str, batch: AttentionBatch, tensors: list[torch.Tensor], rule: AttentionRule = PLAIN) -> torch.Tensor:
    backend = make_attention_backend(name, torch.device("cpu"))
    query, keys, values = tensors
    return backend.forward(query, {"k": keys, "v": values}, backend.plan(batch), rule)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20)), min_size=1, max_size=6),
    page_size=st.sampled_from([1, 4]),
    seed=st.integers(0, 1000),
    rule=st.sampled_from(sorted(RULES)),
)
def test_sdpa_equals_the_definition(lengths: list[tuple[int, int]], page_size: int, seed: int, rule: str) -> None:
    batch, tensors = make_case(lengths, page_size, seed)
    expected = run("torch_reference", batch, tensors, RULES[rule])
    torch.testing.assert_close(run("sdpa", batch, tensors, RULES[rule]), expected)


@pytest.mark.parametrize("rule", ["window", "both"])
def test_a_long_prefill_with_a_window_runs_in_blocks(rule: str) -> None:
    batch, tensors = make_case([(600, 30), (700, 0)], 4, 5)
    expected = run("torch_reference", batch, tensors, RULES[rule])
    torch.testing.assert_close(run("sdpa", batch, tensors, RULES[rule]), expected)


def test_decodes_of_very_different_lengths() -> None:
    batch, tensors = make_case([(1, 0), (1, 1), (1, 300), (1, 290), (5, 40), (1, 7)], 4, 1)
    torch.testing.assert_close(run("sdpa", batch, tensors), run("torch_reference", batch, tensors))


@pytest.mark.parametrize("name", ["sdpa", "torch_reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page_size", [1, 4])
def test_nan_of_another_request_is_not_read(name: str, dtype: torch.dtype, page_size: int) -> None:
    """The second request's keys and values are NaN, and so is all that nobody owns: the ends of pages, and what the table's
    unused entries point to."""
    batch, tensors = make_case([(1, 4), (1, 6), (1, 5), (3, 5), (1, 30)], page_size, 3)
    tensors = [tensor.to(dtype) for tensor in tensors]
    used = [-(-n // page_size) for n in batch.kv_lens]
    for i, num_pages in enumerate(used):
        batch.page_table[i, num_pages:] = batch.page_table[1, 0]
    expected = run(name, batch, tensors)
    own = torch.zeros(len(tensors[1]), dtype=torch.bool)
    for i in (0, 2, 3, 4):
        positions = torch.arange(batch.kv_lens[i])
        own[batch.page_table[i, positions // page_size] * page_size + positions % page_size] = True
    for cache in tensors[1:]:
        cache[~own] = float("nan")
    found = run(name, batch, tensors)
    assert found[1].isnan().all()
    others = [0, 2, 3, 4, 5, 6]
    assert torch.equal(found[others], expected[others])


@pytest.mark.parametrize("name", ["sdpa", "torch_reference"])
def test_entries_beyond_a_requests_pages_are_not_read(name: str) -> None:
    """Page tables hold left-overs of other requests there, and their slots may hold anything."""
    batch, tensors = make_case([(1, 2), (1, 3)], 1, 2)
    expected = run(name, batch, tensors)
    wide = torch.cat([batch.page_table, torch.full((2, 3), int(batch.page_table.max()), dtype=torch.int32)], dim=1)
    torch.testing.assert_close(run(name, AttentionBatch([1, 1], [3, 4], wide, torch.arange(2), 1), tensors), expected)
