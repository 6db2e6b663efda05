"""Attention over latents: decodes, in the absorbed form, and prefills against the plain form as its definition reads."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from waybill.engine.attention import latent_sdpa, make_attention_backend
from waybill.engine.attention.backend import AttentionBatch, AttentionRule

HEADS, RANK, ROPE, KEYS, VALUES = 6, 32, 8, 16, 12


@dataclass(frozen=True)
class Projection:
    """A `LatentProjection`, as its definition reads."""

    keys: torch.Tensor  # [H, N, L]
    values: torch.Tensor  # [H, V, L]

    @property
    def key_width(self) -> int:
        return self.keys.shape[1]

    @property
    def value_width(self) -> int:
        return self.values.shape[1]

    def expand(self, latent: torch.Tensor, heads: slice) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (torch.einsum("nl,hwl->nhw", latent, each[heads]) for each in (self.keys, self.values))
        return keys, values

    def absorb(self, query: torch.Tensor) -> torch.Tensor:
        return torch.einsum("nhw,hwl->nhl", query, self.keys)

    def extract(self, attended: torch.Tensor) -> torch.Tensor:
        return torch.einsum("nhl,hwl->nhw", attended, self.values)


@dataclass(frozen=True)
class Case:
    batch: AttentionBatch
    query: torch.Tensor
    cache: torch.Tensor
    projection: Projection

    def run(self, name: str) -> torch.Tensor:
        backend = make_attention_backend(name, torch.device("cpu"))
        plan = backend.plan(self.batch)
        rule = AttentionRule((KEYS + ROPE) ** -0.5)
        return backend.forward_latent(self.query, {"latent": self.cache}, plan, rule, self.projection)


def make_case(lengths: list[tuple[int, int]], page_size: int, seed: int, values: int = VALUES) -> Case:
    """Requests of (new tokens, cached tokens) on pages in random order."""
    generator = torch.Generator().manual_seed(seed)
    kv_lens = [new + cached for new, cached in lengths]
    pages = [-(-n // page_size) for n in kv_lens]
    order = torch.randperm(sum(pages), generator=generator).to(torch.int32)
    table = torch.zeros(len(lengths), max(pages), dtype=torch.int32)
    for row, part in zip(table, order.split(pages), strict=True):
        row[: len(part)] = part
    batch = AttentionBatch([new for new, _ in lengths], kv_lens, table, torch.arange(len(lengths)), page_size)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return Case(
        batch,
        normal(sum(batch.q_lens), HEADS, KEYS + ROPE),
        normal(sum(pages) * page_size, RANK + ROPE),
        Projection(normal(HEADS, KEYS, RANK) * RANK**-0.5, normal(HEADS, values, RANK) * RANK**-0.5),
    )


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.sampled_from([1, 1, 2, 9]), st.integers(0, 20)), min_size=1, max_size=6),
    page_size=st.sampled_from([1, 4]),
    seed=st.integers(0, 1000),
    values=st.sampled_from([VALUES, KEYS + ROPE, KEYS + ROPE + 4]),
)
def test_sdpa_equals_the_definition(lengths: list[tuple[int, int]], page_size: int, seed: int, values: int) -> None:
    case = make_case(lengths, page_size, seed, values)
    torch.testing.assert_close(case.run("sdpa"), case.run("torch_reference"), rtol=1e-4, atol=1e-5)


def test_prefills_are_expanded_a_few_requests_and_heads_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case([(9, 30), (4, 0), (2, 3)], 4, 1)
    expected = case.run("sdpa")
    expanded: list[tuple[int, int]] = []
    expand = Projection.expand

    def note(self: Projection, latent: torch.Tensor, heads: slice) -> tuple[torch.Tensor, torch.Tensor]:
        expanded.append((len(latent), heads.stop - heads.start))
        return expand(self, latent, heads)

    monkeypatch.setattr(Projection, "expand", note)
    long, short = [(39, 2)] * 3, [(9, 6)]
    for limit, parts in (
        (latent_sdpa.MAX_EXPANDED_BYTES, [(48, 6)]),
        (30_000, long + short),
        (1, [(39, 1)] * 6 + [(4, 1)] * 6 + [(5, 1)] * 6),
    ):
        expanded.clear()
        monkeypatch.setattr(latent_sdpa, "MAX_EXPANDED_BYTES", limit)
        torch.testing.assert_close(case.run("sdpa"), expected)
        assert expanded == parts


@pytest.mark.parametrize("name", ["sdpa", "torch_reference"])
def test_nan_of_another_request_is_not_read(name: str) -> None:
    """The second request's latents are NaN, and so is all that nobody owns: the ends of pages, and what the table's unused
    entries point to."""
    case = make_case([(1, 4), (1, 6), (1, 5), (3, 5), (1, 30)], 4, 3)
    table = case.batch.page_table
    for row, length in zip(table, case.batch.kv_lens, strict=True):
        row[-(-length // 4) :] = table[1, 0]
    expected = case.run(name)
    own = torch.zeros(len(case.cache), dtype=torch.bool)
    for i in (0, 2, 3, 4):
        positions = torch.arange(case.batch.kv_lens[i])
        own[table[i, positions // 4] * 4 + positions % 4] = True
    case.cache[~own] = float("nan")
    found = case.run(name)
    assert found[1].isnan().all()
    others = [0, 2, 3, 4, 5, 6]
    assert torch.equal(found[others], expected[others])
