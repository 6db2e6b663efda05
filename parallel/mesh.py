"""Which rank is where: one frozen mesh of two axes, handed down; nothing here is global.

World = dp x tp; tp varies fastest, so the ranks of a replica are neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from .symmetric_memory import SIZES as SYMMETRIC_SIZES
from .symmetric_memory import SymmetricMemory


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh as a rank sees it: its place, the axis' size, and the group to communicate in.

    `ranks` are the global ranks along it, in order. `group` is None exactly when the size is 1.
    """

    name: str
    rank: int
    size: int
    group: dist.ProcessGroup | None
    ranks: tuple[int, ...]
    # Where the ranks are GPUs of one host.
    symmetric: SymmetricMemory | None = None

    @staticmethod
    def single(name: str = "single") -> Axis:
        """An axis of one rank: every layer runs on it without a process group."""
        return Axis(name, 0, 1, None, (0,))


@dataclass(frozen=True)
class ParallelMesh:
    """A rank's place along every axis. Attention is sharded over `tp` and replicated over `dp`; experts are spread over
    `ep`, which is the whole world today. The world is spread over hosts."""

    device: torch.device
    world: Axis
    dp: Axis
    tp: Axis
    ep: Axis
    # The ranks of this rank's host: neighbours in the world, as many on each.
    node: Axis

    @staticmethod
    def single(device: torch.device) -> ParallelMesh:
        return ParallelMesh(device, *(Axis.single(name) for name in ("world", "dp", "tp", "ep", "node")))

    @staticmethod
    def build(
        dp_size: int,
        tp_size: int,
        device: torch.device,
        num_nodes: int = 1,
        timeout: timedelta | None = None,
        *,
        symmetric_memory: bool = True,
    ) -> ParallelMesh:
        """The mesh of the running process group. `timeout` bounds the collectives of every group but the world's, which has
        its own; None: torch's default. Where one dp rank's GPUs are on one host and reach each other, they all-reduce
        through symmetric memory, unless that is turned off.

        Raises:
            ValueError: the group does not have dp_size * tp_size ranks.
        """
        world_size = dist.get_world_size()
        if dp_size * tp_size != world_size:
            raise ValueError(f"dp_size={dp_size} times tp_size={tp_size}: must be the world size, {world_size}")
        # tp varies fastest.
        ranks = torch.arange(world_size).view(dp_size, tp_size)
        world = _make_axis("world", dist.group.WORLD)
        tp = _make_axis("tp", _own_group(ranks.tolist(), timeout))
        if (
            symmetric_memory
            and device.type == "cuda"
            and dp_size == 1
            and num_nodes == 1
            and _reach_each_other(world, device)
        ):
            assert world.group is not None
            world = replace(world, symmetric=SymmetricMemory.of(world.group, device))
            tp = replace(world, name="tp")
        return ParallelMesh(
            device,
            world,
            _make_axis("dp", _own_group(ranks.t().tolist(), timeout)),
            tp,
            replace(world, name="ep"),
            _make_axis("node", _own_group(ranks.view(num_nodes, -1).tolist(), timeout)),
        )


def _reach_each_other(world: Axis, device: torch.device) -> bool:
    """Whether each rank has a device of its own that can read and write those of all others; all ranks say the same."""
    if world.size not in SYMMETRIC_SIZES:
        return False
    # The processes may each see their device under the same number: then they do not see the others'.
    devices = all_gather_ints(device.index, world)
    reaches = len(set(devices)) == world.size and all(
        torch.cuda.can_device_access_peer(device.index, other) for other in devices if other != device.index
    )
    return all(all_gather_ints(int(reaches), world))


def all_gather_ints(value: int, axis: Axis) -> list[int]:
    """Every rank's number, in rank order; on the CPU."""
    gathered = [torch.zeros(1, dtype=torch.int64) for _ in range(axis.size)]
    dist.all_gather(gathered, torch.tensor([value]), group=axis.group)
    return [int(each) for each in gathered]


def _own_group(groups: list[list[int]], timeout: timedelta | None) -> dist.ProcessGroup | None:
    """Of groups that share out the world the one that this rank is in; one that is the world needs no connections of its
    own. Every rank makes all of them, in the same order."""
    if len(groups) == 1:
        return dist.group.WORLD
    own = None
    for ranks in groups:
        group = dist.new_group(ranks, timeout=timeout)
        if dist.get_rank() in ranks:
            own = group
    return own


def _make_axis(name: str, group: dist.ProcessGroup | None) -> Axis:
    ranks = tuple(dist.get_process_group_ranks(group))
    return Axis(name, dist.get_rank(group), len(ranks), group if len(ranks) > 1 else None, ranks)
