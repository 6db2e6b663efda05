"""The process group of a trainer's rank 0 and all ranks of an engine, beside the default groups of both.

It is joined as the trainers of the field join it: a TCP store at the trainer's address, prefixed with the group's name, in
which torch's own helper for further groups would prefix it again. Both halves use this file.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from .manifest import TensorSpec

BACKENDS = ("gloo", "nccl")
SOURCE = 0
LISTENER_POLL_S = 0.1


class UpdateGroup:
    """Joined on construction, which waits for all of them.

    Args:
        rank: 0 is the trainer, which holds the store.
        device: where tensors travel from and to; a CUDA device for "nccl".

    Raises:
        ValueError: the backend is not known, or does not fit the device.
        RuntimeError: the group did not come together in time (torch's DistStoreError and others).
    """

    def __init__(
        self,
        address: str,
        port: int,
        rank: int,
        world_size: int,
        name: str,
        backend: str,
        device: torch.device,
        timeout_s: float,
    ) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r}: must be one of {', '.join(BACKENDS)}")
        if backend == "nccl" and device.type != "cuda":
            raise ValueError("backend='nccl': needs ranks on CUDA devices; use 'gloo'")
        self.device = device if backend == "nccl" else torch.device("cpu")
        self.world_size = world_size
        if rank != SOURCE:
            wait_for_listener(address, port, timeout_s)
        self._timeout = timeout = timedelta(seconds=timeout_s)
        # A trainer of the field waits at its store until everybody has been counted, which clients do on this word; they
        # themselves do not wait.
        if rank == SOURCE:
            # By itself a store listens on every interface.
            listener = socket.create_server((address, port))
            tcp = TCPStore(
                address, port, world_size, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach()
            )
        else:
            tcp = TCPStore(address, port, world_size, False, timeout)
        # What torch's helper makes of PrefixStore(name, store): one prefix of its own, and one per device.
        store = PrefixStore(f"{self.device.type}/", PrefixStore(f"{name}/", PrefixStore(name, tcp)))
        store.set_timeout(timeout)
        self._tcp = tcp
        self._members = PrefixStore("waybill", PrefixStore(name, tcp))
        self._group: Any
        if backend == "gloo":
            self._group = dist.ProcessGroupGloo(store, rank, world_size, timeout)
        else:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group = dist.ProcessGroupNCCL(store, rank, world_size, options)

    def announce(self, rank: int) -> None:
        """Say to whom it matters that this rank may be told to receive."""
        self._members.set(str(rank), "joined")

    def wait_for_members(self, ranks: Sequence[int], timeout_s: float) -> None:
        """Until all of them have announced themselves: a group's constructor returns when the others have been met, not
        when they have returned.

        Raises:
            RuntimeError: they have not, in time.
        """
        self._members.wait([str(rank) for rank in ranks], timedelta(seconds=timeout_s))

    def broadcast(self, tensor: torch.Tensor) -> None:
        """From the trainer into everybody's tensor; waits for it.

        Raises:
            RuntimeError: the trainer or another rank is gone, or too slow.
        """
        if self._group is None:
            raise RuntimeError("the group was left")
        options = dist.BroadcastOptions()
        options.rootRank = SOURCE
        # With a bound the host waits on a GPU, too, and hears of a failure.
        self._group.broadcast([tensor], options).wait(self._timeout)

    def receive(self, spec: TensorSpec) -> torch.Tensor:
        tensor = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype), device=self.device)
        self.broadcast(tensor)
        return tensor

    def receive_bucket(self, specs: Sequence[TensorSpec]) -> list[torch.Tensor]:
        """All tensors in one transfer, their bytes one behind the other."""
        sizes = [spec.num_bytes for spec in specs]
        flat = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
        self.broadcast(flat)
        return [
            aligned(part, torch_dtype(spec.dtype)).view(spec.shape)
            for spec, part in zip(specs, flat.split(sizes), strict=True)
        ]

    def send_bucket(self, tensors: Sequence[torch.Tensor]) -> None:
        """The trainer's side of `receive_bucket`."""
        self.broadcast(torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]))

    def close(self) -> None:
        """Leave it; the others find out at their next transfer, or at once in the middle of one."""
        if self._group is not None:
            if self.device.type == "cuda":
                self._group.abort()
            # gloo closes its connections when nobody holds the group, and not before.
            self._group = None


def wait_for_listener(address: str, port: int, timeout_s: float) -> None:
    """A store's own attempts to connect take up to twice the time that it is given.

    Raises:
        RuntimeError: nobody listens there in time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with socket.create_connection((address, port), timeout=max(0.1, deadline - time.monotonic())):
                return
        except OSError as error:
            if time.monotonic() + LISTENER_POLL_S > deadline:
                raise RuntimeError(f"nobody listens on {address}:{port} after {timeout_s} s ({error})") from None
        time.sleep(LISTENER_POLL_S)


def aligned(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bytes as values; copied where they begin at a place that the dtype does not allow."""
    return (data if data.storage_offset() % dtype.itemsize == 0 else data.clone()).view(dtype)


def torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
