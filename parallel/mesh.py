"""Which rank is where: one frozen mesh of two axes, handed down; nothing here is global.

World = dp x tp; tp varies fastest, so the ranks of a replica are neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from .collectives import all_gather
from .shared_memory import SharedMemory
from .symmetric_memory import SIZES as SYMMETRIC_SIZES
from .symmetric_memory import RowLayout, SymmetricMemory


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
    # For what is on the CPU, where the ranks are processes of one host.
    shared: SharedMemory | None = None

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
    ) -> ParallelMesh:
        """The mesh of the running process group. `timeout` bounds the collectives of every group but the world's, which has
        its own; None: torch's default.

        Raises:
            ValueError: the group does not have dp_size * tp_size ranks.
        """
        world_size = dist.get_world_size()
        if dp_size * tp_size != world_size:
            raise ValueError(f"dp_size={dp_size} times tp_size={tp_size}: must be the world size, {world_size}")
        # tp varies fastest.
        ranks = torch.arange(world_size).view(dp_size, tp_size)
        world = _make_axis("world", dist.group.WORLD)
        return ParallelMesh(
            device,
            world,
            _make_axis("dp", _own_group(ranks.t().tolist(), timeout)),
            _make_axis("tp", _own_group(ranks.tolist(), timeout)),
            replace(world, name="ep"),
            _make_axis("node", _own_group(ranks.view(num_nodes, -1).tolist(), timeout)),
        )

    def with_symmetric_memory(self, layout: RowLayout) -> ParallelMesh:
        """The same ranks, their collectives of rows through symmetric memory where the GPUs of an axis are on one host and
        reach each other. Called by all ranks together."""
        if self.device.type != "cuda":
            return self
        world = self._with_symmetric_memory(self.world, layout)
        tp = replace(world, name="tp")
        if self.tp.size < self.world.size:
            tp = self._with_symmetric_memory(self.tp, layout)
        return replace(self, world=world, ep=replace(world, name="ep"), tp=tp)

    def with_shared_memory(self, timeout: timedelta) -> ParallelMesh:
        """The same ranks, their collectives of CPU tensors through memory that they share where an axis is within a host.
        Called by all ranks together, which wait so long for each other."""
        world = self._with_shared_memory(self.world, timeout)
        axes = [
            replace(axis, shared=world.shared) if axis.ranks == world.ranks else self._with_shared_memory(axis, timeout)
            for axis in (self.dp, self.tp, self.node)
        ]
        return ParallelMesh(self.device, world, axes[0], axes[1], replace(world, name="ep"), axes[2])

    def _with_shared_memory(self, axis: Axis, timeout: timedelta) -> Axis:
        # All ranks of an axis say the same: there are as many on each host.
        if axis.size == 1 or not set(axis.ranks) <= set(self.node.ranks):
            return axis
        return replace(axis, shared=SharedMemory.of(axis, timeout.total_seconds()))

    def _with_symmetric_memory(self, axis: Axis, layout: RowLayout) -> Axis:
        if not set(axis.ranks) <= set(self.node.ranks) or not _is_connected(axis, self.device):
            return axis
        assert axis.group is not None
        return replace(axis, symmetric=SymmetricMemory.of(axis.group, layout, self.device))


def _is_connected(axis: Axis, device: torch.device) -> bool:
    """Whether each rank has a device of its own that can read and write those of all others; all ranks say the same."""
    if axis.size not in SYMMETRIC_SIZES:
        return False
    # The processes may each see their device under the same number: then they do not see the others'.
    devices = all_gather(torch.tensor([device.index]), axis).tolist()
    reaches = len(set(devices)) == axis.size and all(
        torch.cuda.can_device_access_peer(device.index, other) for other in devices if other != device.index
    )
    return bool(all_gather(torch.tensor([int(reaches)]), axis).all())


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
