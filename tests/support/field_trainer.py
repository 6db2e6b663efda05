"""A trainer of the field, in a process of its own: joins an update group with torch's own helper, as the frameworks do, and
broadcasts one tensor per name. It knows nothing of Waybill.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.distributed_c10d import PrefixStore, _new_process_group_helper, _world, rendezvous

TIMEOUT_S = 60.0


def init_custom_process_group(init_method: str, world_size: int, rank: int, group_name: str) -> dist.ProcessGroup:
    """The recipe that the frameworks copy from each other."""
    timeout = torch.distributed.distributed_c10d.default_pg_timeout
    store, rank, world_size = next(rendezvous(init_method, rank, world_size, timeout=timeout))
    store.set_timeout(timeout)
    group, _ = _new_process_group_helper(
        world_size,
        rank,
        [],
        dist.Backend("gloo"),
        PrefixStore(group_name, store),
        group_name=group_name,
        backend_options=None,
        timeout=timeout,
    )
    _world.pg_group_ranks[group] = {i: i for i in range(world_size)}
    return group


def serve(orders: Connection) -> None:
    """Do what is told, and say when it is done."""
    group: Any = None
    orders.send("done")
    while True:
        order, *arguments = orders.recv()
        if order == "join":
            port, world_size, group_name = arguments
            group = init_custom_process_group(f"tcp://127.0.0.1:{port}", world_size, 0, group_name)
        elif order == "broadcast":
            path, names, dtype = arguments
            tensors = load_file(path)
            for name in names:
                dist.broadcast(tensors[name].to(getattr(torch, dtype)), src=0, group=group)
        orders.send("done")


class FieldTrainer:
    """The test's handle on the process."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._orders, theirs = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(theirs,), daemon=True)
        self._process.start()
        self.wait()

    def tell(self, order: str, *arguments: Any) -> None:
        self._orders.send((order, *arguments))

    def wait(self) -> None:
        assert self._orders.poll(TIMEOUT_S), "the trainer did not do what it was told"
        assert self._orders.recv() == "done"

    def kill(self) -> None:
        """As the kernel does it when memory runs out."""
        assert self._process.pid is not None
        os.kill(self._process.pid, 9)
        self._process.join()

    def stop(self) -> None:
        if self._process.is_alive():
            self._process.terminate()
        self._process.join()
