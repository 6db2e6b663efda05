"""One rank, as torchrun starts it: `python -m waybill.launch.process waybill.launch.worker <command>`.

The ranks tell each other through the rendezvous store where their sockets are. Then the first rank of a node starts the
processes that run beside the ranks there - an output processor and, where no program calls, on node 0 the frontend - before
any accelerator is initialised; then every rank joins the mesh and runs its part.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import zmq
from torch._C._distributed_c10d import FileStore
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ..engine.config import EngineConfig
from ..engine.ipc.frontend_messages import BackendMessage, ControlReply
from ..engine.ipc.heartbeat import Heartbeat, table_of_this_run
from ..engine.ipc.lifeline import EXIT_ORPHANED, watch_lifeline
from ..engine.ipc.log_rate import log_to_stderr
from ..engine.ipc.sockets import Sender
from ..engine.replica import ReplicaEndpoints, run_replica
from ..parallel.collective_sockets import check_whose_connections, listening_sockets, take_in_nobody_else
from ..parallel.mesh import ParallelMesh
from .args import WorkerCommand, parse_worker_args
from .exchange import exchange_addresses, node_address_towards, share_lifeline, share_secrets
from .network_interface import collectives_on_loopback, use_interface_of
from .node_lifeline import NodeLifeline
from .node_options import run_secret
from .run_dir import (
    ADDRESSES,
    ENGINE_CONFIG,
    EXIT_USAGE,
    ROLLOUT_OPTIONS,
    SERVE_OPTIONS,
    agent_lifeline,
    caller_lifeline,
    is_first_to_refuse,
    read_struct,
    remove_run_dir,
    write_struct,
)
from .supervisor import NodeChildren, threads_per_rank
from .topology import FRONTEND, Addresses, Layout, one_node_addresses
from .transfers import Transfers, open_transfers

logger = logging.getLogger(__name__)

COLLECTIVE_TIMEOUT = timedelta(seconds=120)
FAREWELL_S = 2.0


def main() -> int:
    command = parse_worker_args(sys.argv[1:])
    world = TorchrunWorld.from_environment()
    # Ends at once and without a traceback, as at SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    run_dir = command.run_dir
    watch_parents(command)
    config = command.config or read_struct(run_dir, ENGINE_CONFIG, EngineConfig)
    heartbeat = start_heartbeat(config, run_dir)
    store, rank, world_size = open_store(run_dir, world)
    log_to_stderr(config.log_level, logging.Formatter(f"%(levelname)s rank {rank} %(message)s"))
    if world_size != config.world_size:
        raise ValueError(f"torchrun started {world_size} ranks; tp_size * dp_size = {config.world_size}")
    node = meet(command, config, world, store, rank)
    if command.serve is not None and world.node == 0:
        # Not before: until there is a frontend nobody else would hear them.
        set_termination(signal.SIG_IGN)
    addresses = node.addresses
    children = None
    try:
        transfers = open_transfers(config, rank, addresses)
        if world.local_rank == 0:
            children = start_children(command, config, node, transfers)
        run_rank(config, node, store, rank, transfers)
        heartbeat.leave()
    except ValueError as error:
        # A mistake of the user's: said in one line, to the program that waits for the engine, or here.
        if command.config is None:
            report_failure(addresses, str(error))
            raise
        if is_first_to_refuse(run_dir):
            print(f"waybill: {error}", file=sys.stderr, flush=True)
        return EXIT_USAGE
    finally:
        if children is not None:
            waits = rank == 0 and command.has_frontend and sys.exc_info()[0] is None
            code = children.wait(FRONTEND) if waits else 0
            children.stop()
    return code if children is not None else 0


def watch_parents(command: WorkerCommand) -> None:
    """End with torchrun's agent, and with the calling program where there is one."""

    def on_death() -> None:
        remove_run_dir(command.run_dir)

    watch_lifeline(agent_lifeline(command.run_dir), on_death)
    if command.config is None:
        watch_lifeline(caller_lifeline(command.run_dir), on_death)


def start_heartbeat(config: EngineConfig, run_dir: str) -> Heartbeat:
    """This rank's. Where another rank of the node ends before its time, this one does not wait to be told by the agent,
    whose SIGTERM a server's ranks ignore."""

    def on_lost(name: str) -> None:
        remove_run_dir(run_dir)
        os._exit(EXIT_ORPHANED)

    name = f"rank {os.environ['RANK']}"
    return Heartbeat(table_of_this_run(), name, config.heartbeat_timeout_s, is_rank=True, on_lost=on_lost)


@dataclass(frozen=True)
class TorchrunWorld:
    """What torchrun tells a rank of its node."""

    node: int
    num_nodes: int
    local_rank: int

    @staticmethod
    def from_environment() -> TorchrunWorld:
        return TorchrunWorld(
            node=int(os.environ["GROUP_RANK"]),
            num_nodes=int(os.environ["GROUP_WORLD_SIZE"]),
            local_rank=int(os.environ["LOCAL_RANK"]),
        )


def open_store(run_dir: str, world: TorchrunWorld) -> tuple[Store, int, int]:
    """Where the ranks meet, with this one's number and how many there are. On one node it is a file in the run's folder:
    torch's store on TCP asks nobody who connects for his name."""
    if world.num_nodes > 1:
        return next(rendezvous("env://"))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return FileStore(f"{run_dir}/store", world_size), rank, world_size


@dataclass(frozen=True)
class Node:
    """This rank's node in the run, and all endpoints. `lifeline` is there where there are several nodes."""

    rank: int
    layout: Layout
    addresses: Addresses
    lifeline: NodeLifeline | None


def meet(command: WorkerCommand, config: EngineConfig, world: TorchrunWorld, store: Store, rank: int) -> Node:
    """Find the other ranks of this node and, where there are some, of others. The agents have met: all ranks start now."""
    store.set_timeout(COLLECTIVE_TIMEOUT)
    layout = Layout.of(config, world.num_nodes)
    run_dir = command.run_dir
    if world.num_nodes == 1:
        return Node(world.node, layout, one_node_addresses(run_dir, layout), None)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    node_address = command.nodes.node_address or node_address_towards(host, port)
    use_interface_of(node_address)
    secrets = share_secrets(store, rank, run_secret())
    lifeline = NodeLifeline(secrets.token, lambda: remove_run_dir(run_dir), config.heartbeat_timeout_s)
    share_lifeline(store, lifeline, rank, node_address)
    addresses = exchange_addresses(store, layout, rank, run_dir, node_address, secrets.keys)
    return Node(world.node, layout, addresses, lifeline)


def set_termination(action: signal.Handlers) -> None:
    """A server stops in order: the frontend hears the signal, as all processes of the group do, finishes or aborts what
    runs, and tells the ranks, which ignore it. Children inherit what is set."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, action)


def start_children(
    command: WorkerCommand, config: EngineConfig, node: Node, transfers: Transfers | None
) -> NodeChildren:
    """The processes beside the ranks."""
    addresses = node.addresses
    children = NodeChildren(config, node.layout, node.rank, addresses)
    if node.rank < node.layout.num_processors:
        children.start_output_processor(None if transfers is None else transfers.routes)
    if node.rank > 0 or not command.has_frontend:
        return children
    write_struct(addresses.run_dir, ADDRESSES, addresses)
    write_struct(addresses.run_dir, ENGINE_CONFIG, config)
    module = "waybill.rollout.conversations" if command.rollout is not None else "waybill.launch.frontend"
    if command.rollout is not None:
        write_struct(addresses.run_dir, ROLLOUT_OPTIONS, command.rollout)
    if command.serve is not None:
        write_struct(addresses.run_dir, SERVE_OPTIONS, command.serve)
        # A signal ends it from its first moment on, while it imports, too.
        set_termination(signal.SIG_DFL)
    children.start(FRONTEND, [module, "--run-dir", addresses.run_dir], [addresses.frontend])
    if command.serve is not None:
        set_termination(signal.SIG_IGN)
    return children


def run_rank(config: EngineConfig, node: Node, store: Store, rank: int, transfers: Transfers | None) -> None:
    """Join the mesh, serve until told to stop, leave the mesh."""
    # A bound rank shares its cores with none.
    sharing = node.layout.ranks_per_node if config.cpu_threads_bind is None else 1
    torch.set_num_threads(threads_per_rank(config, sharing))
    mesh = join_mesh(config, node.layout, store, rank)
    dp_rank = node.layout.place_of(rank).dp_rank
    addresses = node.addresses
    endpoints = ReplicaEndpoints(
        frontend=addresses.frontend,
        leader=addresses.leaders[dp_rank],
        peers=addresses.peers[dp_rank],
        records=addresses.records[node.layout.processor_of(dp_rank)],
        transfer=None if transfers is None else transfers.pages,
    )
    run_replica(config, mesh, endpoints)
    dist.destroy_process_group()
    if node.lifeline is not None:
        node.lifeline.farewell()


def join_mesh(config: EngineConfig, layout: Layout, store: Store, rank: int) -> ParallelMesh:
    """Meet the other ranks. Afterwards nobody can connect to the sockets at which that happened.

    Raises:
        RuntimeError: they did not come in time, or another user of this host did.
    """
    device = resolve_device(config)
    # A rank whose transfer has broken off waits for those that still wait for the trainer.
    timeout = COLLECTIVE_TIMEOUT + timedelta(seconds=config.weight_sync_timeout_s)
    others = listening_sockets()
    with collectives_on_loopback() if layout.num_nodes == 1 else nullcontext():
        dist.init_process_group(
            backend="gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
            store=PrefixStore("waybill/ranks", store),
            rank=rank,
            world_size=config.world_size,
            timeout=timeout,
        )
        mesh = ParallelMesh.build(config.dp_size, config.tp_size, device, layout.num_nodes, timeout)
    listeners = listening_sockets() - others
    take_in_nobody_else(listeners)
    if layout.num_nodes == 1:
        check_whose_connections(listeners)
    return mesh.with_shared_memory(timeout) if config.collectives_backend == "auto" else mesh


def resolve_device(config: EngineConfig) -> torch.device:
    """This rank's device.

    Raises:
        ValueError: CUDA was asked for and is not there, or has too few devices.
    """
    name = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("device='cuda': torch sees no CUDA device")
        here, found = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > found:
            raise ValueError(f"{here} ranks on this node and {found} CUDA devices: a rank needs one of its own")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        return device
    return torch.device(name)


def report_failure(addresses: Addresses, reason: str) -> None:
    """Tell the waiting frontend why there will be no engine."""
    context = zmq.Context()
    frontend: Sender[BackendMessage] = Sender(context, addresses.frontend)
    frontend.send(ControlReply("ready", False, reason))
    frontend.flush_and_close(FAREWELL_S)
    context.term()


if __name__ == "__main__":
    sys.exit(main())
