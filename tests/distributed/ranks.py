"""Runs a function on real ranks: processes joined by gloo through a file, so that no port is held."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(
    function: Callable[..., None], world_size: int, *args: Any, timeout_s: float = 120.0, backend: str = "gloo"
) -> None:
    """Call `function(*args)` on every rank, with the process group running.

    `function` must stand in a module that a new process can import. What a rank raises is raised here, with its rank and
    traceback; then, and when the time is over, the ranks that are left are ended.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank raised.
        TimeoutError: a rank did not return in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = mp.start_processes(
            _run_rank, (function, world_size, f"{folder}/store", args, timeout_s, backend), world_size, join=False
        )
        deadline = time.monotonic() + timeout_s
        try:
            while not ranks.join(timeout=max(0.1, deadline - time.monotonic())):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{function.__name__}: {world_size} ranks did not end within {timeout_s} s")
        finally:
            for process in ranks.processes:
                process.kill()
                process.join()


def _run_rank(
    rank: int,
    function: Callable[..., None],
    world_size: int,
    store: str,
    args: tuple[Any, ...],
    timeout_s: float,
    backend: str,
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        backend,
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    function(*args)
    dist.barrier()
    dist.destroy_process_group()
