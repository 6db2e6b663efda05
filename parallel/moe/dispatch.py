"""How tokens reach the ranks that hold their experts, and how the results come back.

A dispatcher's `dispatch` returns a frozen record, and `combine` takes it back: nothing is kept in between.

Legend: T tokens of this rank, G tokens that this rank's experts see, D hidden, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from ..collectives import all_reduce
from ..mesh import Axis
from .router import RouterOutput


@dataclass(frozen=True)
class Dispatched:
    """What the local experts work on: hidden [G, D], ids [G, K] and weights [G, K]."""

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


class Dispatcher(Protocol):
    def dispatch(self, hidden: torch.Tensor, routed: RouterOutput) -> Dispatched: ...

    def combine(self, partial: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """Partial results [G, D] of the local experts -> complete results [T, D] of this rank's tokens."""
        ...


class ReplicatedDispatcher:
    """Every rank of the axis holds all tokens already (G = T); the partial results are summed."""

    def __init__(self, axis: Axis) -> None:
        self._axis = axis

    def dispatch(self, hidden: torch.Tensor, routed: RouterOutput) -> Dispatched:
        return Dispatched(hidden, routed.ids, routed.weights)

    def combine(self, partial: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        return all_reduce(partial, self._axis)
