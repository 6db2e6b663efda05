"""Collectives of tensors along an axis. Nothing is pickled; on an axis of one rank every call costs nothing.

All ranks of an axis must call them in the same order with the same shapes and dtypes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F

if TYPE_CHECKING:
    from .mesh import Axis
    from .shared_memory import SharedMemory

# So many terms have one sum, in whatever order.
PAIR = 2


def _shared_memory(x: torch.Tensor, axis: Axis) -> SharedMemory | None:
    return axis.shared if x.device.type == "cpu" else None


def all_reduce(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Sum over the axis, maybe in place; every rank ends with the same bits. On the CPU terms are added as in
    `sum_of_terms`."""
    if axis.size == 1:
        return x
    if axis.symmetric is not None:
        if axis.symmetric.sums(x, scatter=False):
            return axis.symmetric.sum_rows(x, scatter=False)
        if axis.symmetric.takes_two_shots(x):
            return axis.symmetric.two_shot_all_reduce(x)
    if (shared := _shared_memory(x, axis)) is not None:
        return shared.all_reduce(x)
    if x.device.type == "cpu" and axis.size > PAIR and x.is_floating_point():
        # gloo adds a number's terms in an order that its place decides; shares and a gather are as many bytes.
        shares = F.pad(x.reshape(-1), (0, -x.numel() % axis.size))
        return all_gather(reduce_scatter(shares, axis), axis)[: x.numel()].view(x.shape)
    dist.all_reduce(x, group=axis.group)
    return x


def all_gather(x: torch.Tensor, axis: Axis, dim: int = 0) -> torch.Tensor:
    """The ranks' tensors, concatenated along `dim` in rank order."""
    if axis.size == 1:
        return x
    if (shared := _shared_memory(x, axis)) is not None:
        gathered = shared.all_gather(x)
    else:
        gathered = x.new_empty(axis.size, *x.shape)
        dist.all_gather(list(gathered.unbind(0)), x.contiguous(), group=axis.group)
    return gathered.flatten(0, 1) if dim == 0 else torch.cat(list(gathered.unbind(0)), dim)


def gather_bytes(data: bytes, axis: Axis) -> list[bytes]:
    """Every rank's bytes, of any length, in rank order; two collectives on the CPU."""
    if axis.size == 1:
        return [data]
    sizes = all_gather(torch.tensor([len(data)]), axis).tolist()
    padded = torch.zeros(1, max(1, *sizes), dtype=torch.uint8)
    padded[0, : len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else padded[0, :0]
    rows = all_gather(padded, axis).numpy()
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


def gather(x: torch.Tensor, axis: Axis, dim: int = 0) -> torch.Tensor | None:
    """As `all_gather`, but on the axis' rank 0 alone; None on the others."""
    if axis.size == 1:
        return x
    if (shared := _shared_memory(x, axis)) is not None:
        gathered = shared.gather(x)
        return None if gathered is None else torch.cat(list(gathered.unbind(0)), dim)
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
    if axis.symmetric is not None and axis.symmetric.sums(x, scatter=True):
        return axis.symmetric.sum_rows(x, scatter=True)
    if (shared := _shared_memory(x, axis)) is not None:
        return shared.reduce_scatter(x)
    if x.device.type == "cpu":
        # gloo reduces in rounds; one exchange and a local sum take a third of the time at the size of a decode step, and
        # the sum is rounded once.
        parts = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(parts, x.contiguous(), group=axis.group)
        terms = parts.unflatten(0, (axis.size, -1))
        is_narrow = x.is_floating_point() and x.itemsize < torch.float32.itemsize
        return sum_of_terms(terms.float() if is_narrow else terms).to(x.dtype)
    out = x.new_empty(x.shape[0] // axis.size, *x.shape[1:])
    dist.reduce_scatter_tensor(out, x.contiguous(), group=axis.group)
    return out


def sum_of_terms(terms: torch.Tensor) -> torch.Tensor:
    """[n, *] -> [*], pairs of neighbours first, then pairs of their sums: terms that are sums themselves, of two or four,
    make the same tree as all of those alone."""
    while len(terms) > 1:
        pairs = terms[: len(terms) // 2 * 2]
        terms = torch.cat((pairs[0::2] + pairs[1::2], terms[len(pairs) :]))
    return terms[0]


def exchange(x: torch.Tensor, send_sizes: list[int], receive_sizes: list[int], axis: Axis) -> torch.Tensor:
    """Rows of dim 0 to the ranks they are for: the first `send_sizes[0]` to rank 0 and so on; what arrives is
    concatenated in rank order, `receive_sizes[r]` rows from rank r."""
    if axis.size == 1:
        return x
    out = x.new_empty(sum(receive_sizes), *x.shape[1:])
    if (shared := _shared_memory(x, axis)) is not None and shared.exchange(x, send_sizes, out):
        return out
    dist.all_to_all_single(out, x.contiguous(), receive_sizes, send_sizes, group=axis.group)
    return out


def broadcast(x: torch.Tensor, axis: Axis, source: int = 0) -> torch.Tensor:
    """The tensor of the axis' rank `source`, in place on the others."""
    if axis.size == 1:
        return x
    if (shared := _shared_memory(x, axis)) is not None:
        return shared.broadcast(x, source)
    dist.broadcast(x, src=axis.ranks[source], group=axis.group)
    return x
