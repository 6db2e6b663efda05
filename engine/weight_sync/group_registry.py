"""The update groups of one rank. Joining one waits for a trainer, so it happens beside the step thread."""

from __future__ import annotations

import logging
from collections.abc import Callable

from ...parallel.mesh import ParallelMesh
from ..control.operations import InitWeightsUpdateGroup
from ..ipc.critical_thread import start_critical_thread
from .update_group import UpdateGroup, resolve_backend

logger = logging.getLogger(__name__)

MAX_LOGGED = 500


class GroupRegistry:
    """Groups by name: joined, or still to come together."""

    def __init__(self, mesh: ParallelMesh, timeout_s: float, max_groups: int) -> None:
        self._mesh = mesh
        self._timeout_s = timeout_s
        self._max_groups = max_groups
        self._joined: dict[str, UpdateGroup] = {}
        self._pending: set[str] = set()
        self._num_joins = 0
        # By name, of the groups that there are: names are the trainers' choice, and any number of them may come.
        self._serials: dict[str, int] = {}

    def check(self, op: InitWeightsUpdateGroup) -> None:
        """
        Raises:
            ValueError: the request does not fit this engine, or the name is taken.
        """
        if op.group_name in self._joined or op.group_name in self._pending:
            raise ValueError(f"group_name: {op.group_name!r} is taken; destroy that group first")
        if len(self._joined) + len(self._pending) >= self._max_groups:
            raise ValueError(
                f"group_name: {self._max_groups} groups (weight_sync_groups) are joined or still to come together; "
                "destroy one first, or wait"
            )
        resolve_backend(op.backend, self._mesh.device)
        own = self._mesh.world.size
        last = op.world_size - own
        if last < 1:
            raise ValueError(
                f"world_size={op.world_size}: must be at least {own + 1}, for {own} engine ranks and the trainer"
            )
        if not 1 <= op.rank_offset <= last:
            raise ValueError(
                f"rank_offset={op.rank_offset}: must lie in 1 .. {last}, for {own} engine ranks in a group of "
                f"{op.world_size} (world_size)"
            )

    def join(self, op: InitWeightsUpdateGroup, done: Callable[[str | None], None]) -> None:
        """Join in the background; `done` hears there why it failed, or None."""
        self._pending.add(op.group_name)
        self._num_joins += 1
        self._serials[op.group_name] = self._num_joins
        start_critical_thread(lambda: self._join(op, done), f"join {op.group_name}")

    def _join(self, op: InitWeightsUpdateGroup, done: Callable[[str | None], None]) -> None:
        error = None
        first, world = op.rank_offset, self._mesh.world
        try:
            group = UpdateGroup(
                op.master_address,
                op.master_port,
                first + world.rank,
                op.world_size,
                op.group_name,
                op.backend,
                self._mesh.device,
                self._timeout_s,
            )
            self._joined[op.group_name] = group
            group.announce(first + world.rank)
            if world.rank == 0:
                group.wait_for_members(range(first, first + world.size), self._timeout_s)
        except (ValueError, RuntimeError, OSError, MemoryError) as problem:
            # What is found at an address, and what it says, is for the operator alone: a client could look for hosts and
            # ports with it.
            where = f"{op.master_address}:{op.master_port}"
            logger.warning("group %r at %s: %r", op.group_name, where, str(problem)[:MAX_LOGGED])
            error = (
                f"group {op.group_name!r} did not come together within {self._timeout_s:g} s; the log of rank "
                f"{world.rank} says why"
            )
            self.discard(op.group_name)
        finally:
            self._pending.discard(op.group_name)
        done(error)

    def get(self, name: str) -> UpdateGroup:
        """
        Raises:
            ValueError: this rank has not joined a group of that name.
        """
        if name not in self._joined:
            state = "has not come together yet" if name in self._pending else "was not joined"
            raise ValueError(f"group_name: {name!r} {state}")
        return self._joined[name]

    def serial(self, name: str) -> int:
        """Tells a group from all others of this rank, also of its name; 0 if there is none."""
        return self._serials.get(name, 0)

    def discard(self, name: str) -> bool:
        """Leave it at once, also in the middle of a transfer; whether there was one.

        A trainer whose bucket was refused may have begun to send it. Nothing tells its bytes from those of the next bucket,
        so nothing more is received in that group.
        """
        group = self._joined.pop(name, None)
        self._serials.pop(name, None)
        if group is not None:
            group.close()
        return group is not None
