"""What each rank checks of collectives through shared memory: the numbers are gloo's, whatever the order of calls."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from waybill.parallel import shared_memory
from waybill.parallel.collectives import all_gather, all_reduce, broadcast, exchange, gather, reduce_scatter
from waybill.parallel.mesh import Axis, ParallelMesh

# Small enough that tensors of the checks go in parts.
SLOT_BYTES = 4096
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
NUM_CALLS = 300


def check_shared_memory() -> None:
    shared_memory.SLOT_BYTES = SLOT_BYTES
    world_size = dist.get_world_size()
    plain = ParallelMesh.build(world_size // 2, 2, torch.device("cpu"))
    mesh = plain.with_shared_memory(timedelta(seconds=60))
    assert mesh.ep.shared is mesh.world.shared is not None
    check_many_calls(mesh.world, plain.world)
    check_many_calls(mesh.tp, plain.tp)
    check_bits(mesh.world, plain.world)
    check_late_rank(plain.world)


def check_many_calls(axis: Axis, plain: Axis) -> None:
    """All kinds, sizes and dtypes in one random order, with ranks that come late."""
    order, own = random.Random(0), random.Random(axis.rank)
    for number in range(NUM_CALLS):
        operation = order.choice(OPERATIONS)
        shape = (order.choice((0, 1, 2, 3)) * axis.size, order.choice((1, 3, 700)))
        dtype = order.choice(DTYPES)
        values = torch.randint(0, 2 if dtype == torch.bool else 5, (axis.size, *shape)).to(dtype)
        # All ranks know all tensors.
        broadcast(values, plain)
        if own.random() < 0.05:
            time.sleep(0.002)
        seed = order.random()
        found, expected = (operation(values[axis.rank].clone(), each, seed) for each in (axis, plain))
        assert (found is None) == (expected is None), (number, operation)
        assert found is None or (found.dtype == dtype and torch.equal(found, expected)), (
            number,
            operation,
            shape,
            dtype,
        )


def exchange_some(x: torch.Tensor, axis: Axis, seed: float) -> torch.Tensor:
    """Some rows to each rank, at times more than a slot has room for."""
    choice = random.Random(seed)
    sizes = [[choice.choice((0, 1, 5)) for _ in range(axis.size)] for _ in range(axis.size)]
    sent, received = sizes[axis.rank], [row[axis.rank] for row in sizes]
    rows = torch.cat([x.new_full((count, x.shape[1]), 1) * target for target, count in enumerate(sent)])
    return exchange(rows.to(x.dtype), sent, received, axis)


def all_reduce_numbers(x: torch.Tensor, axis: Axis, seed: float) -> torch.Tensor:
    return all_reduce(x, axis) if x.dtype != torch.bool else x


def reduce_scatter_numbers(x: torch.Tensor, axis: Axis, seed: float) -> torch.Tensor:
    return reduce_scatter(x, axis) if x.dtype != torch.bool else x


OPERATIONS: tuple[Callable[[torch.Tensor, Axis, float], torch.Tensor | None], ...] = (
    all_reduce_numbers,
    reduce_scatter_numbers,
    lambda x, axis, seed: all_gather(x, axis),
    lambda x, axis, seed: all_gather(x.t(), axis, dim=1),
    lambda x, axis, seed: gather(x, axis),
    lambda x, axis, seed: gather(x, axis, dim=1),
    lambda x, axis, seed: broadcast(x, axis, source=axis.size - 1),
    lambda x, axis, seed: broadcast(x.t(), axis).t(),
    exchange_some,
)


def check_bits(axis: Axis, plain: Axis) -> None:
    """A number's sum does not depend on its place, nor on the call that makes it, and is rounded once; without shared
    memory, too."""
    for dtype in (torch.float32, torch.bfloat16):
        terms = torch.randn(axis.size, 4 * axis.size, 1021, generator=torch.Generator().manual_seed(1)).to(dtype)
        own = terms[axis.rank]
        total = all_reduce(own.clone(), axis)
        rows = torch.cat([all_reduce(row[None].clone(), axis) for row in own])
        assert torch.equal(total, rows)
        assert torch.equal(reduce_scatter(own, axis), total.chunk(axis.size)[axis.rank])
        # Pairs of neighbours first, so that two ranks of two terms each have the same sum as four.
        wide = terms.float()
        while len(wide) > 1:
            wide = wide[0::2] + wide[1::2]
        assert torch.equal(total, wide[0].to(dtype))
        assert torch.equal(total, all_reduce(own.clone(), plain))


def check_late_rank(plain: Axis) -> None:
    """Who waits gives up in time, and says for whom."""
    shared = shared_memory.SharedMemory.of(plain, timeout_s=0.2)
    assert shared is not None
    if plain.rank == 0:
        with pytest.raises(TimeoutError, match=r"rank 1 of the axis has not come to a collective within 0\.2 s"):
            shared.all_gather(torch.zeros(1))
    dist.barrier()


def check_no_shared_memory() -> None:
    """Where one rank cannot map it, all of them have none."""
    plain = ParallelMesh.build(1, dist.get_world_size(), torch.device("cpu"))
    if plain.world.rank == 1:
        shared_memory.ORDERED_MACHINES = ()
    mesh = plain.with_shared_memory(timedelta(seconds=60))
    assert mesh.world.shared is None
    assert all_reduce(torch.ones(3), mesh.world).tolist() == [mesh.world.size] * 3
