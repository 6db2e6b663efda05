"""How many connections the limit of open files leaves room for."""

from __future__ import annotations

import resource
from pathlib import Path

DEFAULT_CONNECTIONS = 8192
# The engine's sockets that are not open yet, and what libraries open for a moment.
RESERVED = 64
RESERVED_PER_RANK = 4


def connections_within_limit(asked: int | None, num_ranks: int, spare: int, files_each: int = 1) -> int:
    """How many clients may be connected, `asked` or a default. The soft limit is raised as far as needed.

    Args:
        spare: connections beyond them, which are told that there are too many.
        files_each: open files of a client, its connection and what is opened for it.

    Raises:
        ValueError: fewer than `asked` fit, or none.
    """
    open_now = len(list(Path("/proc/self/fd").iterdir()))
    reserved = open_now + RESERVED + RESERVED_PER_RANK * num_ranks + spare
    wanted = DEFAULT_CONNECTIONS if asked is None else asked
    most = (raise_limit(wanted * files_each + reserved) - reserved) // files_each
    if most < 1 or (asked is not None and most < asked):
        raise ValueError(
            f"--max-connections {wanted}: the limit of open files (ulimit -n) leaves room for {max(0, most)}, "
            f"{reserved} are needed for other things"
        )
    return min(wanted, most)


def raise_limit(needed: int) -> int:
    """This process' limit of open files, raised towards `needed` if it is lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return needed if soft == resource.RLIM_INFINITY else soft
    reachable = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (reachable, hard))
    return reachable
