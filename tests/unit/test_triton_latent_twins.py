"""The Triton kernels of latent attention against their torch twins: compiled where there is a GPU, else interpreted."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton")
from support.triton_twins import DEVICE, DTYPES, TOLERANCE, normal

from waybill.engine.attention.backend import AttentionBatch, AttentionRule
from waybill.engine.attention.torch_reference import TorchReferenceAttention
from waybill.engine.attention.triton_paged import TritonPagedAttention
from waybill.engine.models.norm_rope import LatentNorm, TorchLayerOps
from waybill.engine.models.norm_rope_triton import TritonLayerOps


@dataclass(frozen=True)
class LatentHeads:
    """A `LatentProjection`: W_UK [H, N, L] and W_UV [H, V, L], as one product each."""

    keys: torch.Tensor
    values: torch.Tensor

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
        return torch.bmm(query.transpose(0, 1), self.keys).transpose(0, 1)

    def extract(self, attended: torch.Tensor) -> torch.Tensor:
        return torch.bmm(attended.transpose(0, 1), self.values.transpose(1, 2)).transpose(0, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("page_size", "lengths"), [(1, [(1, 0), (1, 299), (1, 63)]), (4, [(1, 4), (3, 9), (1, 128)])])
@pytest.mark.parametrize("heads", [4, 20, 80])
def test_decode_attention_over_latents(
    dtype: torch.dtype, page_size: int, lengths: list[tuple[int, int]], heads: int
) -> None:
    """Heads fill a tile of 16 in part, or one of 32, or two of 64; with and without a prefill beside the decodes."""
    rank, rope, keys, values = 32, 16, 24, 20
    q_lens, kv_lens = [new for new, _ in lengths], [new + cached for new, cached in lengths]
    pages = [-(-n // page_size) for n in kv_lens]
    order = torch.randperm(sum(pages), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    table = torch.zeros(len(lengths) + 2, max(pages), dtype=torch.int32)
    rows = torch.arange(len(lengths)).flip(0) + 1
    for row, part in zip(rows.tolist(), order.split(pages), strict=True):
        table[row, : len(part)] = part
    query = normal(sum(q_lens), heads, keys + rope, dtype=dtype)
    cache = {"latent": normal(sum(pages) * page_size, rank + rope, dtype=dtype, seed=1)}
    weights = [normal(heads, width, rank, dtype=dtype, seed=2) * rank**-0.5 for width in (keys, values)]
    batch = AttentionBatch(q_lens, kv_lens, table.to(DEVICE), rows.to(DEVICE), page_size)
    projection, rule = LatentHeads(*weights), AttentionRule((keys + rope) ** -0.5)
    expected, found = (
        backend.forward_latent(query, cache, backend.plan(batch), rule, projection)
        for backend in (TorchReferenceAttention(), TritonPagedAttention())
    )
    torch.testing.assert_close(found, expected, **TOLERANCE[dtype])


def test_decode_attention_over_latents_reads_nothing_beyond_a_requests() -> None:
    """Other requests' NaN stand there: in the pages of the neighbour, and in what is left of the last page."""
    page_size, kv_lens, rank, rope = 4, [5, 70], 32, 16
    table = torch.zeros(2, 18, dtype=torch.int32)
    table[0, :2], table[0, 2:] = torch.tensor([0, 1]), 2
    table[1] = torch.arange(2, 20)
    cache = {"latent": normal(80, rank + rope, dtype=torch.float32, seed=1)}
    query = normal(2, 4, 24 + rope, dtype=torch.float32)
    projection = LatentHeads(*(normal(4, width, rank, dtype=torch.float32, seed=2) for width in (24, 20)))
    batch = AttentionBatch([1, 1], kv_lens, table.to(DEVICE), torch.arange(2).to(DEVICE), page_size)
    backend = TritonPagedAttention()
    expected = backend.forward_latent(query, cache, backend.plan(batch), AttentionRule(0.2), projection)
    cache["latent"][5:] = float("nan")
    found = backend.forward_latent(query, cache, backend.plan(batch), AttentionRule(0.2), projection)
    assert torch.equal(found[0], expected[0])
    assert found[1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_interleaved", [True, False])
@pytest.mark.parametrize(("content", "rank", "rope", "heads"), [(24, 40, 16, 3), (16, 32, 12, 20)])
def test_rope_and_store_of_latents(
    dtype: torch.dtype, is_interleaved: bool, content: int, rank: int, rope: int, heads: int
) -> None:
    tokens, slots = 5, 12
    query = normal(tokens, heads, content + rope, dtype=dtype)
    # Latents of queries stand in front.
    compressed = normal(tokens, 7 + rank + rope, dtype=dtype, seed=1)[:, 7:]
    norm = LatentNorm(normal(rank, dtype=dtype, seed=2), 1e-6, is_interleaved)
    turns = (normal(tokens, 1, rope, dtype=dtype, seed=3), normal(tokens, 1, rope, dtype=dtype, seed=4))
    where = torch.tensor([3, 0, 11, 7, 5], device=DEVICE)
    results = []
    for ops in (TorchLayerOps(), TritonLayerOps()):
        cache = torch.zeros(slots, rank + rope, dtype=dtype, device=DEVICE)
        results.append((ops.latent_rope_store(query, compressed, norm, turns, where, cache), cache))
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_the_first_columns_of_latents(dtype: torch.dtype) -> None:
    hidden, weight = normal(5, 48, dtype=dtype)[:, :32], normal(32, dtype=dtype, seed=1)
    expected, found = (ops.rms_norm(hidden, weight, 1e-6) for ops in (TorchLayerOps(), TritonLayerOps()))
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, **TOLERANCE[dtype])
