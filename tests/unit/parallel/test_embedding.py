"""Cutting of the vocabulary, without ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from waybill.parallel.embedding import ParallelLMHead, VocabParallelEmbedding, VocabShard
from waybill.parallel.mesh import Axis

CPU = torch.device("cpu")


def test_shards_cover_the_vocabulary_once_and_pad_with_zeros() -> None:
    """Ranks that hold a part of the padding, and ranks that hold nothing else."""
    weight = torch.randn(5, 3)
    shards = []
    for rank in range(4):
        shard = VocabShard(5, 3, Axis("tp", rank, 4, None, (0, 1, 2, 3)), dtype=torch.float32, device=CPU)
        shard.sharded_weight().load(weight)
        shards.append(shard.weight)
    assert torch.equal(torch.cat(shards), F.pad(weight, (0, 0, 0, 3)))


def test_on_one_rank_they_are_plain_lookup_and_product() -> None:
    weight, x = torch.randn(7, 4), torch.randn(2, 4)
    embedding = VocabParallelEmbedding(7, 4, Axis.single(), dtype=torch.float32, device=CPU)
    embedding.sharded_weight().load(weight)
    head = ParallelLMHead(7, 4, Axis.single(), dtype=torch.float32, device=CPU)
    head.tie(embedding)
    assert torch.equal(embedding(torch.tensor([6, 0, 6])), weight[[6, 0, 6]])
    assert torch.equal(head(x), F.linear(x, weight))
    assert head.weight is embedding.weight
