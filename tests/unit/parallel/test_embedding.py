"""Cutting of the vocabulary, without ranks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from waybill.parallel import embedding
from waybill.parallel.embedding import ParallelLMHead, VocabParallelEmbedding, VocabShard
from waybill.parallel.mesh import Axis
from waybill.parallel.weight_format import WeightFormat

CPU = torch.device("cpu")


def test_shards_cover_the_vocabulary_once_and_pad_with_zeros() -> None:
    """Ranks that hold a part of the padding, and ranks that hold nothing else."""
    weight = torch.randn(5, 3)
    shards = []
    for rank in range(4):
        shard = VocabShard(
            5, 3, Axis("tp", rank, 4, None, (0, 1, 2, 3)), weight_format=WeightFormat(torch.float32, CPU)
        )
        shard.sharded_weight().load(weight)
        shards.append(shard.weight)
    assert torch.equal(torch.cat(shards), F.pad(weight, (0, 0, 0, 3)))


def test_nan_in_a_row_reaches_nobody_elses_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank looks some row up for tokens that another rank holds, too: its first one here, or its last."""
    monkeypatch.setattr(embedding, "all_reduce", lambda x, axis: x)
    weight = torch.randn(8, 3)
    weight[[3, 4]] = float("nan")
    ids = torch.tensor([0, 2, 3, 4, 5, 7])
    total = torch.zeros(6, 3)
    for rank in range(2):
        shard = VocabParallelEmbedding(
            8, 3, Axis("tp", rank, 2, None, (0, 1)), weight_format=WeightFormat(torch.float32, CPU)
        )
        shard.sharded_weight().load(weight)
        total += shard(ids)
    assert torch.equal(total.isnan().any(dim=1), torch.tensor([False, False, True, True, False, False]))
    assert torch.equal(total[[0, 1, 4, 5]], weight[[0, 2, 5, 7]])


@pytest.mark.parametrize("rank", [0, 7])
def test_a_head_that_leaves_ranks_without_a_token_is_refused(rank: int) -> None:
    """Two columns a rank are enough for seven."""
    axis = Axis("tp", rank, 8, None, tuple(range(8)))
    with pytest.raises(ValueError, match="vocab_size=14: must leave a token for each of 8 tp ranks"):
        ParallelLMHead(14, 4, axis, weight_format=WeightFormat(torch.float32, CPU))
    ParallelLMHead(15, 4, axis, weight_format=WeightFormat(torch.float32, CPU))


def test_on_one_rank_they_are_plain_lookup_and_product() -> None:
    weight, x = torch.randn(7, 4), torch.randn(2, 4)
    table = VocabParallelEmbedding(7, 4, Axis.single(), weight_format=WeightFormat(torch.float32, CPU))
    table.sharded_weight().load(weight)
    head = ParallelLMHead(7, 4, Axis.single(), weight_format=WeightFormat(torch.float32, CPU))
    head.tie(table)
    assert torch.equal(table(torch.tensor([6, 0, 6])), weight[[6, 0, 6]])
    assert torch.equal(head(x), F.linear(x, weight))
    assert head.weight is table.weight
