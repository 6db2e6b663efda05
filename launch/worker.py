"""One rank, as torchrun starts it: `python -m waybill.launch.worker <command>`.

Rank 0 starts the output processor and, where no program calls, the frontend - before any accelerator is initialised -
and publishes their addresses through the rendezvous store. Then every rank joins the mesh and runs its part.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from datetime import timedelta

import msgspec
import torch
import torch.distributed as dist
import zmq
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ..engine.config import EngineConfig
from ..engine.io_struct import BackendMessage, ControlReply
from ..engine.lifeline import watch_lifeline, watch_parent
from ..engine.replica import ReplicaEndpoints, run_replica
from ..engine.sockets import Sender
from ..parallel.mesh import ParallelMesh
from .args import WorkerCommand, parse_worker_args
from .run_dir import (
    ADDRESSES,
    ENGINE_CONFIG,
    ROLLOUT_OPTIONS,
    SERVE_OPTIONS,
    make_run_dir,
    read_struct,
    remove_run_dir,
    write_struct,
)
from .supervisor import RankZeroChildren, threads_per_rank
from .topology import Addresses, make_addresses, place_of

logger = logging.getLogger(__name__)

ADDRESSES_KEY = "waybill/addresses"
COLLECTIVE_TIMEOUT = timedelta(seconds=120)
FAREWELL_S = 2.0


def main() -> int:
    command = parse_worker_args(sys.argv[1:])
    if command.serve is not None:
        ignore_termination()
    else:
        # Ends at once and without a traceback, as at SIGTERM.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    watch_parent()
    store, rank, world_size = next(rendezvous("env://"))
    config = read_struct(command.run_dir, ENGINE_CONFIG, EngineConfig) if command.run_dir else command.config
    assert config is not None
    logging.basicConfig(level=config.log_level.upper(), format=f"%(levelname)s rank {rank} %(message)s")
    if world_size != config.world_size:
        raise ValueError(f"torchrun started {world_size} ranks; tp_size * dp_size = {config.world_size}")
    if world_size != int(os.environ["LOCAL_WORLD_SIZE"]):
        raise ValueError("nnodes: must be 1; a run over several nodes is not available yet")
    children = None
    if rank == 0:
        addresses = make_addresses(command.run_dir or make_run_dir(), config.dp_size, config.tp_size)
        children = start_children(command, config, addresses)
        store.set(ADDRESSES_KEY, msgspec.msgpack.encode(addresses))
    addresses = msgspec.msgpack.decode(store.get(ADDRESSES_KEY), type=Addresses)
    if command.run_dir:
        watch_lifeline(addresses.caller_lifeline, on_death=lambda: remove_run_dir(addresses.run_dir))
    try:
        run_rank(config, addresses, store, rank)
    except ValueError as error:
        # A mistake of the user's: said in one line, to whoever waits for the engine.
        if rank == 0:
            report_failure(addresses, str(error))
        raise
    finally:
        if children is not None:
            code = children.wait("frontend") if command.has_frontend and sys.exc_info()[0] is None else 0
            children.stop()
            if not command.run_dir:
                remove_run_dir(addresses.run_dir)
    return code if children is not None else 0


def ignore_termination() -> None:
    """A server stops in order: the frontend hears the signal, as all processes of the group do, finishes or aborts what
    runs, and tells the ranks. Children inherit this."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def start_children(command: WorkerCommand, config: EngineConfig, addresses: Addresses) -> RankZeroChildren:
    """The processes beside the ranks."""
    write_struct(addresses.run_dir, ADDRESSES, addresses)
    children = RankZeroChildren(config, addresses)
    if command.has_frontend:
        write_struct(addresses.run_dir, ENGINE_CONFIG, config)
    if command.rollout is not None:
        write_struct(addresses.run_dir, ROLLOUT_OPTIONS, command.rollout)
        children.start("frontend", ["waybill.launch.rollout", "--run-dir", addresses.run_dir])
    if command.serve is not None:
        write_struct(addresses.run_dir, SERVE_OPTIONS, command.serve)
        children.start("frontend", ["waybill.launch.frontend", "--run-dir", addresses.run_dir])
    return children


def run_rank(config: EngineConfig, addresses: Addresses, store: Store, rank: int) -> None:
    """Join the mesh, serve until told to stop, leave the mesh."""
    torch.set_num_threads(threads_per_rank(config))
    device = resolve_device(config)
    dist.init_process_group(
        backend="gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
        store=PrefixStore("waybill/ranks", store),
        rank=rank,
        world_size=config.world_size,
        # A rank whose transfer has broken off waits for those that still wait for the trainer.
        timeout=COLLECTIVE_TIMEOUT + timedelta(seconds=config.weight_sync_timeout_s),
    )
    mesh = ParallelMesh.build(config.dp_size, config.tp_size, device)
    place = place_of(rank, config.tp_size)
    endpoints = ReplicaEndpoints(
        frontend=addresses.frontend,
        leader=addresses.leaders[place.dp_rank],
        peers=addresses.peers[place.dp_rank],
        records=addresses.records,
    )
    run_replica(config, mesh, endpoints)
    dist.destroy_process_group()


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
