"""Token embedding and output head with the vocabulary sharded over an axis.

The vocabulary is padded so that every rank holds the same number of rows; padding is zero and is cut off the logits.

Legend: T tokens, N rows, V vocabulary, D hidden, n size of the axis.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .collectives import all_gather, all_reduce, gather
from .mesh import Axis
from .weight_format import WeightFormat
from .weights import ShardedWeight


class VocabShard(nn.Module):
    """This rank's rows of a [V, D] matrix."""

    def __init__(self, vocab_size: int, hidden_size: int, axis: Axis, *, weight_format: WeightFormat) -> None:
        super().__init__()
        self._full = (vocab_size, hidden_size)
        self._axis = axis
        self._num_rows = -(-vocab_size // axis.size)
        self._first = axis.rank * self._num_rows
        self.weight = weight_format.empty(self._num_rows, hidden_size)
        self.weight.data[max(0, min(self._num_rows, vocab_size - self._first)) :] = 0

    def sharded_weight(self) -> ShardedWeight:
        """This rank's rows; what lies beyond the vocabulary stays zero."""
        num_rows = max(0, min(self._full[0] - self._first, self._num_rows))
        return ShardedWeight.of(self._full, self.weight.data[:num_rows], first=self._first)


class VocabParallelEmbedding(VocabShard):
    """Ids [T] -> [T, D]: each rank looks up the ids it holds, and the sum has every row once."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self._axis.size == 1 or len(ids) == 0:
            return F.embedding(ids, self.weight)
        local = ids - self._first
        held = (local >= 0) & (local < self._num_rows)
        rows = F.embedding(local.clamp(0, self._num_rows - 1), self.weight)
        # Filled in, not multiplied: the row that stands in for another rank's may hold NaN.
        return all_reduce(rows.masked_fill(~held[:, None], 0), self._axis)


class ParallelLMHead(VocabShard):
    """Hidden states [N, D] -> logits [N, V] on the axis' rank 0, which samples; None on the others.

    With `gather_to_all` every rank gets them.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        axis: Axis,
        *,
        gather_to_all: bool = False,
        weight_format: WeightFormat,
    ) -> None:
        super().__init__(vocab_size, hidden_size, axis, weight_format=weight_format)
        self._gather_to_all = gather_to_all
        self._linear = weight_format.linear()

    def tie(self, embedding: VocabParallelEmbedding) -> None:
        """Use the embedding's rows, which are sharded alike."""
        self.weight = embedding.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor | None:
        local = self._linear(hidden, self.weight, None)
        logits = all_gather(local, self._axis, dim=-1) if self._gather_to_all else gather(local, self._axis, dim=-1)
        return None if logits is None else logits[:, : self._full[0]]
