"""Which rank is where: one frozen mesh of two axes, handed down; nothing here is global.

World = dp x tp; tp varies fastest, so the ranks of a replica are neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh


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

    @staticmethod
    def single(name: str = "single") -> Axis:
        """An axis of one rank: every layer runs on it without a process group."""
        return Axis(name, 0, 1, None, (0,))


@dataclass(frozen=True)
class ParallelMesh:
    """A rank's place along every axis. Attention is sharded over `tp` and replicated over `dp`; experts are spread over
    `world`, which is spread over hosts."""

    device: torch.device
    world: Axis
    dp: Axis
    tp: Axis
    # The ranks of this rank's host: neighbours in the world, as many on each.
    node: Axis

    @staticmethod
    def single(device: torch.device) -> ParallelMesh:
        return ParallelMesh(device, Axis.single("world"), Axis.single("dp"), Axis.single("tp"), Axis.single("node"))

    @staticmethod
    def build(dp_size: int, tp_size: int, device: torch.device, num_nodes: int = 1) -> ParallelMesh:
        """The mesh of the running process group.

        Raises:
            ValueError: the group does not have dp_size * tp_size ranks.
        """
        world_size = dist.get_world_size()
        if dp_size * tp_size != world_size:
            raise ValueError(f"dp_size={dp_size} times tp_size={tp_size}: must be the world size, {world_size}")
        mesh = init_device_mesh(device.type, (dp_size, tp_size), mesh_dim_names=("dp", "tp"))
        node_group = dist.group.WORLD
        if num_nodes > 1:
            node_group, _ = dist.new_subgroups(world_size // num_nodes)
        return ParallelMesh(
            device,
            _make_axis("world", dist.group.WORLD),
            _make_axis("dp", mesh.get_group("dp")),
            _make_axis("tp", mesh.get_group("tp")),
            _make_axis("node", node_group),
        )


def _make_axis(name: str, group: dist.ProcessGroup | None) -> Axis:
    ranks = tuple(dist.get_process_group_ranks(group))
    return Axis(name, dist.get_rank(group), len(ranks), group if len(ranks) > 1 else None, ranks)
