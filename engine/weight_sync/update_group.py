"""The process group of a trainer's rank 0 and all ranks of an engine, beside the default groups of both.

It is joined as the trainers of the field join it: a TCP store at the trainer's address, prefixed with the group's name, in
which torch's own helper for further groups would prefix it again. Both halves use this file.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from ...parallel.collective_sockets import address_towards, listening_sockets, take_in_nobody_else
from ..control.operations import BACKENDS
from .delta_codec import aligned
from .manifest import TensorSpec
from .trainer_store import cut_off_after, wait_for_listener

SOURCE = 0
# Whose sockets are new is known while one group at a time opens some.
DEVICE_LOCK = threading.Lock()


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
        backend = resolve_backend(backend, device)
        self.device = device if backend == "nccl" else torch.device("cpu")
        self.world_size = world_size
        self._timeout = timedelta(seconds=timeout_s)
        self._group: Any
        with nullcontext() if rank == SOURCE else cut_off_after(timeout_s, address, port):
            self._join(address, port, rank, name, backend)

    def _join(self, address: str, port: int, rank: int, name: str, backend: str) -> None:
        timeout, world_size = self._timeout, self.world_size
        if rank != SOURCE:
            wait_for_listener(address, port, timeout.total_seconds())
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
        if backend == "gloo":
            # Not in torch's type stubs.
            gloo: Any = dist.ProcessGroupGloo
            options = gloo._Options()
            options._timeout = timeout
            options._devices, listeners = open_devices(address, port)
            self._group = gloo(store, rank, world_size, options)
            take_in_nobody_else(listeners)
        else:
            nccl_options = dist.ProcessGroupNCCL.Options()
            nccl_options._timeout = timeout
            self._group = dist.ProcessGroupNCCL(store, rank, world_size, nccl_options)

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
        # Not every backend knows numbers of a byte.
        self.broadcast(tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor)
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


def resolve_backend(backend: str, device: torch.device) -> str:
    """What a group of ranks on such devices uses: "gloo" or "nccl".

    Raises:
        ValueError: it is not known, or does not fit the device.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: must be one of {', '.join(BACKENDS)}")
    if backend == "nccl" and device.type != "cuda":
        raise ValueError("backend='nccl': needs ranks on CUDA devices; use 'gloo'")
    if backend == "auto":
        return "nccl" if device.type == "cuda" else "gloo"
    return backend


def open_devices(address: str, port: int) -> tuple[list[Any], frozenset[int]]:
    """What gloo listens with, and its sockets: at the address with which the trainer is reached, by itself it takes that of
    the host's name; or on the interfaces that the environment names."""
    names = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    with DEVICE_LOCK:
        others = listening_sockets()
        if names:
            devices = [dist.ProcessGroupGloo.create_device(interface=name, lazy_init=False) for name in names]
        else:
            own = address_towards(address, port)
            devices = [dist.ProcessGroupGloo.create_device(hostname=own, lazy_init=False)]
        return devices, listening_sockets() - others


def torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
