"""Which cores of a node its ranks keep to, and which the engine's other processes.

torchrun's agent, and what rank 0 starts, run where no rank does. torchrun starts a bound rank as `python -m
waybill.launch.cpu_binding GROUPS -m MODULE ...`, which takes the cores of its group and becomes the rank: whatever that
imports finds these cores, and every thread that is ever started in it stays on them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Set
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..engine.validation.core_groups import parse_core_groups

if TYPE_CHECKING:
    from ..engine.config import EngineConfig

MODULE = "waybill.launch.cpu_binding"


def cores_of_others(config: EngineConfig, ranks_here: int) -> Set[int] | None:
    """Where the engine's processes of this node that are no ranks run: on the cores that this process may use and no rank
    has. Where the ranks leave none, it is all that this process may use; None if nothing is bound.

    Raises:
        ValueError: the ranks of this node cannot be bound so.
    """
    text = config.cpu_threads_bind
    if text is None:
        return None
    if sys.platform != "linux":
        raise ValueError(f"cpu_threads_bind={text!r}: needs Linux, this is {sys.platform}")
    groups, usable = parse_core_groups(text), os.sched_getaffinity(0)
    if len(groups) != ranks_here:
        raise ValueError(
            f"cpu_threads_bind={text!r}: must have {ranks_here} groups, one for each rank of a node; it has {len(groups)}"
        )
    taken = frozenset().union(*groups)
    if missing := taken - usable:
        raise ValueError(
            f"cpu_threads_bind={text!r}: core {min(missing)} must be one of those that this process may use: "
            f"{as_ranges(usable)}"
        )
    return usable - taken or usable


def as_ranges(cores: Set[int]) -> str:
    """As a user writes them: 0-3,6."""
    firsts = sorted(core for core in cores if core - 1 not in cores)
    lasts = sorted(core for core in cores if core + 1 not in cores)
    return ",".join(
        f"{first}-{last}" if last > first else str(first) for first, last in zip(firsts, lasts, strict=True)
    )


@contextmanager
def running_on(cores: Set[int] | None) -> Iterator[None]:
    """What the calling thread starts meanwhile keeps to these cores; None binds nothing."""
    if cores is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def keep_to(cores: Set[int]) -> None:
    """This process and all that it starts. Libraries may have started threads when they were imported; others must not come
    or go meanwhile."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), cores)


def main() -> None:
    groups = parse_core_groups(sys.argv[1])
    os.sched_setaffinity(0, groups[int(os.environ["LOCAL_RANK"])])
    # The same command without this module and the groups.
    command = sys.orig_argv
    here = command.index("-m")
    os.execv(sys.executable, [sys.executable, *command[1:here], *command[here + 3 :]])


if __name__ == "__main__":
    main()
