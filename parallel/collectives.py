"""Collectives of tensors along an axis. Nothing is pickled; on an axis of one rank every call costs nothing.

All ranks of an axis must call them in the same order with the same shapes and dtypes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from .mesh import Axis


def all_reduce(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Sum over the axis, in place; every rank ends with the same bits."""
    if axis.size > 1:
        dist.all_reduce(x, group=axis.group)
    return x


def all_gather(x: torch.Tensor, axis: Axis, dim: int = 0) -> torch.Tensor:
    """The ranks' tensors, concatenated along `dim` in rank order."""
    if axis.size == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(axis.size)]
    dist.all_gather(parts, x.contiguous(), group=axis.group)
    return torch.cat(parts, dim)


def gather(x: torch.Tensor, axis: Axis, dim: int = 0) -> torch.Tensor | None:
    """As `all_gather`, but on the axis' rank 0 alone; None on the others."""
    if axis.size == 1:
        return x
    parts = None
    if axis.rank == 0:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(axis.size)]
    dist.gather(x.contiguous(), parts, dst=axis.ranks[0], group=axis.group)
    return None if parts is None else torch.cat(parts, dim)


def reduce_scatter(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Sum over the axis, then this rank's share of dim 0, whose size must be a multiple of the axis'."""
    if axis.size == 1:
        return x
    assert x.shape[0] % axis.size == 0
    out = x.new_empty(x.shape[0] // axis.size, *x.shape[1:])
    dist.reduce_scatter_tensor(out, x.contiguous(), group=axis.group)
    return out


def broadcast(x: torch.Tensor, axis: Axis, source: int = 0) -> torch.Tensor:
    """The tensor of the axis' rank `source`, in place on the others."""
    if axis.size > 1:
        dist.broadcast(x, src=axis.ranks[source], group=axis.group)
    return x
