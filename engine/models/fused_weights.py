"""Tensors that hold several of a checkpoint's in one."""

from __future__ import annotations

from dataclasses import dataclass

from ...parallel.weights import ShardedWeight


@dataclass(frozen=True)
class FusedWeight:
    """This rank's part of the tensor, and the names of those that it stands for."""

    weight: ShardedWeight
    names: frozenset[str]
