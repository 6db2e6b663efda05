"""Token embedding and output head with the vocabulary sharded over an axis.

The vocabulary is padded so that every rank holds the same number of rows; padding is zero and is cut off the logits.

Legend: T tokens, N rows, V vocabulary, D hidden, n size of the axis.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .collectives import all_reduce, gather
from .mesh import Axis
from .weight_format import WeightFormat
from .weights import ShardedWeight

# See `look_up_torch`.
LookUp = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


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


def look_up_torch(ids: torch.Tensor, weight: torch.Tensor, first: int) -> torch.Tensor:
    """Rows [T, D] of ids [T], where `weight` has those from `first` on; zeros where it has not."""
    local = ids - first
    held = (local >= 0) & (local < weight.shape[0])
    rows = F.embedding(local.clamp(0, weight.shape[0] - 1), weight)
    # Filled in, not multiplied: the row that stands in for another rank's may hold NaN.
    return rows.masked_fill(~held[:, None], 0)


def select_look_up(device: torch.device) -> LookUp:
    """The fastest for the device."""
    if device.type == "cpu":
        return look_up_torch
    # Triton comes with torch's CUDA builds alone.
    from .embedding_triton import look_up_triton  # noqa: PLC0415

    return look_up_triton


class VocabParallelEmbedding(VocabShard):
    """Ids [T] -> [T, D]: each rank looks up the ids it holds, and the sum has every row once."""

    def __init__(self, vocab_size: int, hidden_size: int, axis: Axis, *, weight_format: WeightFormat) -> None:
        super().__init__(vocab_size, hidden_size, axis, weight_format=weight_format)
        self._look_up = select_look_up(weight_format.device)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self._axis.size == 1 or len(ids) == 0:
            return F.embedding(ids, self.weight)
        return all_reduce(self._look_up(ids, self.weight, self._first), self._axis)


class ParallelLMHead(VocabShard):
    """Hidden states [N, D] to this rank's columns of the logits [N, V], and those to all columns on the axis' rank 0."""

    def __init__(self, vocab_size: int, hidden_size: int, axis: Axis, *, weight_format: WeightFormat) -> None:
        """
        Raises:
            ValueError: a rank would have no column, and nothing to choose a token among.
        """
        super().__init__(vocab_size, hidden_size, axis, weight_format=weight_format)
        if self._num_rows * (axis.size - 1) >= vocab_size:
            raise ValueError(f"vocab_size={vocab_size}: must leave a token for each of {axis.size} {axis.name} ranks")
        self._linear = weight_format.linear()

    def tie(self, embedding: VocabParallelEmbedding) -> None:
        """Use the embedding's rows, which are sharded alike."""
        self.weight = embedding.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits of this rank's tokens, [N, V / n], padding of the vocabulary included."""
        return self._linear(hidden, self.weight, None)

    def gather(self, local: torch.Tensor) -> torch.Tensor | None:
        """All columns [N, V] on rank 0; None on the others. Every rank must call it."""
        logits = gather(local, self._axis, dim=-1)
        return None if logits is None else logits[:, : self._full[0]]

    @property
    def columns(self) -> tuple[int, int]:
        """The first token that this rank has a column for, and how many there are without padding."""
        return self._first, max(0, min(self._full[0] - self._first, self._num_rows))
