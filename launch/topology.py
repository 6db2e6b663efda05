"""Who talks to whom, and where: pure, no sockets, no processes.

One run has one folder, and every socket of a node is an IPC endpoint in it; the folder is readable by its owner alone.
"""

from __future__ import annotations

import msgspec

# The kernel's limit on the path of a unix socket, terminating zero included.
MAX_SOCKET_PATH = 108


class Addresses(msgspec.Struct, frozen=True):
    """Endpoints of one run. `peers` are those of tp ranks 1 and up of each dp rank."""

    run_dir: str
    frontend: str
    leaders: list[str]
    peers: list[list[str]]
    records: str
    queries: str

    @property
    def lifeline(self) -> str:
        """The FIFO that rank 0 holds for the processes it starts."""
        return f"{self.run_dir}/rank0.alive"

    @property
    def caller_lifeline(self) -> str:
        """The FIFO that the calling program holds for the ranks."""
        return f"{self.run_dir}/caller.alive"


class RankPlace(msgspec.Struct, frozen=True):
    """Coordinates of a global rank: tp varies fastest, so a replica's ranks are neighbours."""

    dp_rank: int
    tp_rank: int

    @property
    def is_leader(self) -> bool:
        return self.tp_rank == 0


def place_of(rank: int, tp_size: int) -> RankPlace:
    return RankPlace(rank // tp_size, rank % tp_size)


def make_addresses(run_dir: str, dp_size: int, tp_size: int) -> Addresses:
    """Endpoints in `run_dir`.

    Raises:
        ValueError: the folder's path leaves no room for a socket's name.
    """

    def ipc(name: str) -> str:
        path = f"{run_dir}/{name}"
        if len(path.encode()) >= MAX_SOCKET_PATH:
            raise ValueError(
                f"run_dir={run_dir!r}: {path!r} exceeds {MAX_SOCKET_PATH - 1} bytes; set TMPDIR to a shorter path"
            )
        return f"ipc://{path}"

    return Addresses(
        run_dir=run_dir,
        frontend=ipc("frontend"),
        leaders=[ipc(f"leader{dp}") for dp in range(dp_size)],
        peers=[[ipc(f"peer{dp}.{tp}") for tp in range(1, tp_size)] for dp in range(dp_size)],
        records=ipc("records"),
        queries=ipc("queries"),
    )
