"""Who talks to whom, and where: pure, no sockets, no processes.

A run has one folder on each node, readable by its owner alone. A socket that is used on its own node only is an IPC
endpoint in that folder; one that other nodes use, too, is a TCP endpoint whose port nobody chose: see `exchange.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from ..engine.config import EngineConfig
from ..engine.ipc.sockets import Endpoint
from .run_dir import TEMPORARY

# The kernel's limit on the path of a unix socket, terminating zero included.
MAX_SOCKET_PATH = 108
FRONTEND = "frontend"
MAX_PID = 1 << 22


class Addresses(msgspec.Struct, frozen=True):
    """Endpoints of one run, as seen from one node, whose folder `run_dir` is. `peers` are those of tp ranks 1 and up of
    each dp rank; `records` and `queries` are those of each output processor."""

    run_dir: str
    frontend: Endpoint
    leaders: list[Endpoint]
    peers: list[list[Endpoint]]
    records: list[Endpoint]
    queries: list[Endpoint]

    @property
    def lifeline(self) -> str:
        """The FIFO that the node's first rank holds for the processes it starts."""
        return f"{self.run_dir}/rank0.alive"


class RankPlace(msgspec.Struct, frozen=True):
    """Coordinates of a global rank: tp varies fastest, so a replica's ranks are neighbours."""

    dp_rank: int
    tp_rank: int

    @property
    def is_leader(self) -> bool:
        return self.tp_rank == 0


@dataclass(frozen=True)
class SocketPlace:
    """A socket: which rank opens it, for itself or a process that it starts, and the nodes from which it is used."""

    name: str
    rank: int
    nodes: frozenset[int]

    @property
    def is_local(self) -> bool:
        return len(self.nodes) == 1


@dataclass(frozen=True)
class Layout:
    """How the ranks of a run are spread over its nodes: the same number on each, neighbours together."""

    dp_size: int
    tp_size: int
    num_nodes: int = 1
    # "engine": one output processor, on node 0; "node": one on each.
    output_processors: str = "engine"

    @staticmethod
    def of(config: EngineConfig, num_nodes: int) -> Layout:
        """
        Raises:
            ValueError: the ranks cannot be spread so.
        """
        layout = Layout(config.dp_size, config.tp_size, num_nodes, config.output_processors)
        if layout.world_size % num_nodes:
            raise ValueError(
                f"--nnodes {num_nodes}: must divide --dp {config.dp_size} times --tp {config.tp_size}: "
                "every node has the same number of ranks"
            )
        if layout.num_processors > 1 and layout.ranks_per_node % config.tp_size:
            raise ValueError(
                f"--output-processors node: a dp group of --tp {config.tp_size} ranks would span nodes, "
                f"which have {layout.ranks_per_node} each; --tp must divide the ranks of a node, "
                "or use --output-processors engine"
            )
        return layout

    @property
    def world_size(self) -> int:
        return self.dp_size * self.tp_size

    @property
    def ranks_per_node(self) -> int:
        return self.world_size // self.num_nodes

    @property
    def num_processors(self) -> int:
        return self.num_nodes if self.output_processors == "node" else 1

    def node_of(self, rank: int) -> int:
        return rank // self.ranks_per_node

    def place_of(self, rank: int) -> RankPlace:
        return RankPlace(rank // self.tp_size, rank % self.tp_size)

    def leader_of(self, dp_rank: int) -> int:
        return dp_rank * self.tp_size

    def processor_of(self, dp_rank: int) -> int:
        """The output processor that a leader sends its records to; processor p runs on node p."""
        return self.node_of(self.leader_of(dp_rank)) if self.num_processors > 1 else 0

    def dp_ranks_of(self, processor: int) -> tuple[int, ...]:
        return tuple(dp_rank for dp_rank in range(self.dp_size) if self.processor_of(dp_rank) == processor)

    def sockets(self) -> list[SocketPlace]:
        """Every socket of the run that something binds."""
        leader_nodes = [self.node_of(self.leader_of(dp_rank)) for dp_rank in range(self.dp_size)]
        # Every rank may have something to report to the frontend.
        places = [SocketPlace(FRONTEND, 0, frozenset(range(self.num_nodes)))]
        for dp_rank, node in enumerate(leader_nodes):
            leader = self.leader_of(dp_rank)
            places.append(SocketPlace(leader_name(dp_rank), leader, frozenset({node, 0})))
            for tp_rank in range(1, self.tp_size):
                nodes = frozenset({node, self.node_of(leader + tp_rank)})
                places.append(SocketPlace(peer_name(dp_rank, tp_rank), leader + tp_rank, nodes))
        for processor in range(self.num_processors):
            rank = processor * self.ranks_per_node
            users = {leader_nodes[dp_rank] for dp_rank in self.dp_ranks_of(processor)}
            places.append(SocketPlace(records_name(processor), rank, frozenset({processor, *users})))
            places.append(SocketPlace(queries_name(processor), rank, frozenset({processor, 0})))
        return places

    def addresses(self, run_dir: str, endpoints: Mapping[str, Endpoint]) -> Addresses:
        """All endpoints, by the names of `sockets`."""
        return Addresses(
            run_dir=run_dir,
            frontend=endpoints[FRONTEND],
            leaders=[endpoints[leader_name(dp_rank)] for dp_rank in range(self.dp_size)],
            peers=[
                [endpoints[peer_name(dp_rank, tp_rank)] for tp_rank in range(1, self.tp_size)]
                for dp_rank in range(self.dp_size)
            ],
            records=[endpoints[records_name(processor)] for processor in range(self.num_processors)],
            queries=[endpoints[queries_name(processor)] for processor in range(self.num_processors)],
        )


def leader_name(dp_rank: int) -> str:
    return f"leader{dp_rank}"


def peer_name(dp_rank: int, tp_rank: int) -> str:
    return f"peer{dp_rank}.{tp_rank}"


def records_name(processor: int) -> str:
    return f"records{processor}"


def queries_name(processor: int) -> str:
    return f"queries{processor}"


def ipc_endpoint(run_dir: str, name: str) -> Endpoint:
    """A socket's endpoint in `run_dir`.

    Raises:
        ValueError: the folder's path leaves no room for a socket's name.
    """
    path = f"{run_dir}/{name}"
    if len(path.encode()) >= MAX_SOCKET_PATH:
        raise ValueError(
            f"run_dir={run_dir!r}: {path!r} exceeds {MAX_SOCKET_PATH - 1} bytes; set TMPDIR to a shorter path"
        )
    return Endpoint(f"ipc://{path}")


def one_node_addresses(run_dir: str, layout: Layout) -> Addresses:
    """The endpoints of a run on one node.

    Raises:
        ValueError: the folder's path leaves no room for a socket's name.
    """
    assert layout.num_nodes == 1
    if layout.world_size > 1:
        # torch's symmetric memory makes one there for every rank, and does not check its length.
        ipc_endpoint(run_dir, f"{TEMPORARY}/symm_mem-{MAX_PID}")
    return layout.addresses(run_dir, {place.name: ipc_endpoint(run_dir, place.name) for place in layout.sockets()})
