"""Linear layers sharded over an axis (Megatron-LM, Shoeybi et al. 2019).

Column-parallel layers keep a slice of the outputs, row-parallel ones a slice of the inputs, and give partial results.
Every layer cuts its own slice out of the unsharded tensor of a checkpoint. Weights are [out, in], as in torch.

Legend: T tokens, D inputs, O outputs, d head width, n size of the axis.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import nn

from .mesh import Axis
from .weight_format import Placed, WeightFormat
from .weights import ShardedWeight


def shard_size(size: int, axis: Axis, what: str) -> int:
    """One rank's share of `size`.

    Raises:
        ValueError: the axis does not divide it.
    """
    if size % axis.size:
        raise ValueError(f"{what}={size}: must be a multiple of the {axis.name} size, {axis.size}")
    return size // axis.size


class ShardedLinear(nn.Module):
    """The part that all have: this rank's weight [out, in] and bias [out], and the product."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        weight_format: WeightFormat,
        row_cuts: tuple[int, ...] = (),
        column_cuts: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.matrix = weight_format.matrix(out_features, in_features, row_cuts=row_cuts, column_cuts=column_cuts)
        self.bias = weight_format.empty(out_features) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.matrix(x, self.bias)
        return out

    @property
    def weight(self) -> nn.Parameter:
        """As it is stored."""
        return self.matrix.data

    def _sharded_rows(self, shape: tuple[int, int], first: int, rows: slice) -> ShardedWeight:
        """Of a matrix of this shape the rows from `first` on, which are these `rows` of this rank's."""
        index = (slice(first, first + rows.stop - rows.start), slice(0, shape[1]))
        return self.matrix.sharded(shape, Placed(index, rows))


class MergedColumnParallelLinear(ShardedLinear):
    """Several column-parallel matrices with the same input as one product; the outputs stand side by side."""

    def __init__(
        self,
        in_features: int,
        out_features: list[int],
        axis: Axis,
        *,
        bias: bool = False,
        replicated: tuple[int, ...] = (),
        weight_format: WeightFormat,
    ) -> None:
        """`replicated` are the matrices that every rank holds whole, by number."""
        self._full = out_features
        self._axes = [Axis.single() if part in replicated else axis for part in range(len(out_features))]
        self._local = [
            shard_size(size, each, "out_features") for size, each in zip(out_features, self._axes, strict=True)
        ]
        self._in_features = in_features
        cuts = [size for size, each in zip(self._local, self._axes, strict=True) if each.size > 1]
        row_cuts = (*accumulate(self._local[:-1]), *cuts)
        super().__init__(in_features, sum(self._local), bias, weight_format, row_cuts=row_cuts)

    def sharded_weight(self, part: int) -> ShardedWeight:
        """This rank's rows of the `part`-th matrix."""
        rows = self._rows(part)
        return self._sharded_rows((self._full[part], self._in_features), self._first_row(part), rows)

    def sharded_bias(self, part: int) -> ShardedWeight:
        assert self.bias is not None
        return ShardedWeight.of((self._full[part],), self.bias.data[self._rows(part)], first=self._first_row(part))

    def _rows(self, part: int) -> slice:
        begin = sum(self._local[:part])
        return slice(begin, begin + self._local[part])

    def _first_row(self, part: int) -> int:
        return self._axes[part].rank * self._local[part]


class QKVParallelLinear(ShardedLinear):
    """Query, key and value projections of this rank's heads as one product.

    With more ranks than kv heads each kv head is held by several neighbouring ranks, whose query heads all use it.
    """

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int,
        axis: Axis,
        *,
        bias: bool = False,
        weight_format: WeightFormat,
    ) -> None:
        self.num_local_heads = shard_size(num_heads, axis, "num_heads")
        if num_kv_heads >= axis.size:
            self.num_local_kv_heads, self.num_kv_replicas = shard_size(num_kv_heads, axis, "num_kv_heads"), 1
        else:
            if axis.size % num_kv_heads:
                raise ValueError(f"num_kv_heads={num_kv_heads}: must divide the {axis.name} size, {axis.size}")
            self.num_local_kv_heads, self.num_kv_replicas = 1, axis.size // num_kv_heads
        self._hidden_size = hidden_size
        self._axis = axis
        self._full = {"q": num_heads * head_dim, "k": num_kv_heads * head_dim, "v": num_kv_heads * head_dim}
        kv_size = self.num_local_kv_heads * head_dim
        self._local = {"q": self.num_local_heads * head_dim, "k": kv_size, "v": kv_size}
        sizes = list(self._local.values())
        row_cuts = (*accumulate(sizes[:-1]), *(sizes if axis.size > 1 else ()))
        super().__init__(hidden_size, sum(sizes), bias, weight_format, row_cuts=row_cuts)

    def sharded_weight(self, part: str) -> ShardedWeight:
        """This rank's rows of the query, key or value matrix: `part` is "q", "k" or "v"."""
        shape = (self._full[part], self._hidden_size)
        return self._sharded_rows(shape, self._first_row(part), self._rows(part))

    def sharded_bias(self, part: str) -> ShardedWeight:
        assert self.bias is not None
        return self.sharded_vector(part, self.bias.data[self._rows(part)])

    def sharded_vector(self, part: str, storage: torch.Tensor) -> ShardedWeight:
        """One number for each row of the query, key or value matrix; `storage` has those of this rank's rows."""
        return ShardedWeight.of((self._full[part],), storage, first=self._first_row(part))

    def _first_row(self, part: str) -> int:
        shard = self._axis.rank if part == "q" else self._axis.rank // self.num_kv_replicas
        return shard * self._local[part]

    def _rows(self, part: str) -> slice:
        first = {"q": 0, "k": self._local["q"], "v": self._local["q"] + self._local["k"]}[part]
        return slice(first, first + self._local[part])


class RowParallelLinear(ShardedLinear):
    """A slice of the inputs per rank: [T, D/n] -> [T, O], a partial result, maybe in float32. The caller sums them over
    the axis, in a way of its own (vLLM and sglang: `reduce_results=False`). The bias is held by rank 0 of the axis alone:
    the sum has it once."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        axis: Axis,
        *,
        bias: bool = False,
        weight_format: WeightFormat,
    ) -> None:
        local = shard_size(in_features, axis, "in_features")
        column_cuts = (local,) if axis.size > 1 else ()
        super().__init__(local, out_features, bias, weight_format, column_cuts=column_cuts)
        self._full = (out_features, in_features)
        self._axis = axis
        self.matrix.shard_over(axis.size)
        if self.bias is not None and axis.rank > 0:
            self.bias.data.zero_()

    def sharded_weight(self) -> ShardedWeight:
        """This rank's columns."""
        num_rows, num_columns = self.weight.shape
        first = self._axis.rank * num_columns
        index = (slice(0, num_rows), slice(first, first + num_columns))
        return self.matrix.sharded(self._full, Placed(index, slice(0, num_rows)))

    def sharded_bias(self) -> ShardedWeight:
        assert self.bias is not None
        return ShardedWeight.of(self._full[:1], self.bias.data if self._axis.rank == 0 else self.bias.data[:0])
