"""Where a step's tokens lie between the layers.

With one dp rank the tokens are replicated: every tp rank holds all rows, and partial results are all-reduced.

With several (data-parallel attention) they are scattered: each tp rank holds a share of its dp rank's rows, so that a MoE
layer routes every token once in the world (sequence parallelism, Korthikanti et al. 2022). Attention and dense MLPs gather
the rows of their dp rank, and their partial results are reduce-scattered. All ranks hold the same number of rows in a
step, so that collectives over the world match; rows behind a dp rank's tokens are padding.

Legend: T tokens of this dp rank, P rows of each rank in this step, D hidden, n size of the tp axis; n * P >= T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from .collectives import all_gather
from .mesh import Axis
from .partial_sum import PartialSum


class TokenLayout(Protocol):
    """A step's rows on this rank."""

    @property
    def axis(self) -> Axis:
        """The tp ranks, which share the rows of their dp rank, or hold all of them."""
        ...

    @property
    def is_padding(self) -> torch.Tensor | None:
        """Which of this rank's rows are no tokens: [P] bool, on their device; None: all are tokens."""
        ...

    @property
    def is_fixed(self) -> bool:
        """Whether nothing may depend on what the rows are but their number, as in a CUDA graph."""
        ...

    def scatter(self, x: torch.Tensor) -> torch.Tensor:
        """All rows of the dp rank, [T, D], to those of this rank, [P, D]."""
        ...

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse: [P, D] -> [T, D]."""
        ...

    def run_sharded(self, block: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> PartialSum:
        """A block that takes all rows of the dp rank, [T, D], and yields a partial sum of them on each tp rank: from this
        rank's rows of its input to the sum of which this rank wants its rows, [P, D]."""
        ...


@dataclass(frozen=True)
class ReplicatedTokens:
    """Every rank holds every row: P = T."""

    axis: Axis

    is_fixed = False
    is_padding = None

    def scatter(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def run_sharded(self, block: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> PartialSum:
        return PartialSum(block(x), self.axis)


@dataclass(frozen=True)
class ScatteredTokens:
    """Rank r of the tp axis holds rows [r * P, (r + 1) * P) of its dp rank's tokens."""

    num_tokens: int
    num_rows: int
    axis: Axis
    device: torch.device

    is_fixed = False

    def __post_init__(self) -> None:
        assert self.num_rows * self.axis.size >= self.num_tokens

    @property
    def num_held(self) -> int:
        """Rows of this rank that are tokens; the rows behind them are padding."""
        return min(max(self.num_tokens - self.axis.rank * self.num_rows, 0), self.num_rows)

    @cached_property
    def is_padding(self) -> torch.Tensor | None:
        if self.num_held == self.num_rows:
            return None
        return torch.arange(self.num_rows, device=self.device) >= self.num_held

    def scatter(self, x: torch.Tensor) -> torch.Tensor:
        first = self.axis.rank * self.num_rows
        return pad_rows(x[first : first + self.num_held], self.num_rows)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return all_gather(x, self.axis)[: self.num_tokens]

    def run_sharded(self, block: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> PartialSum:
        if self.num_tokens == 0:
            # All ranks of the axis are here for their experts alone.
            return PartialSum.of_one(torch.zeros_like(x))
        term = pad_rows(block(self.gather(x)), self.num_rows * self.axis.size)
        return PartialSum(term, self.axis, scatter=True)


@dataclass(frozen=True)
class FixedTokens:
    """As `ScatteredTokens`, for a CUDA graph: padding runs through attention, too (T = n * P), and which rows it is only
    the device knows."""

    num_rows: int
    axis: Axis
    padding: torch.Tensor  # [T] bool

    is_fixed = True

    @property
    def is_padding(self) -> torch.Tensor:
        return self.scatter(self.padding)

    def scatter(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.axis.rank * self.num_rows :][: self.num_rows]

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return all_gather(x, self.axis)

    def run_sharded(self, block: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> PartialSum:
        return PartialSum(block(self.gather(x)), self.axis, scatter=True)


def pad_rows(x: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Zeros behind the rows of `x`, up to `num_rows`."""
    if x.shape[0] == num_rows:
        return x
    padded = x.new_zeros(num_rows, *x.shape[1:])
    padded[: x.shape[0]] = x
    return padded


def rows_per_rank(num_tokens: list[int], tp_size: int) -> int:
    """P for a step in which dp rank i has `num_tokens[i]`: the largest share; 0 if nobody has any."""
    return -(-max(num_tokens) // tp_size)
