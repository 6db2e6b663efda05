"""The transport `shared`, within a host: a rank of a decode's side maps the pool of a prefill's rank and copies from it."""

from __future__ import annotations

import io
import logging
import mmap
import re
import secrets
import time
from collections.abc import Callable

import numpy as np
import torch

from ..kv_cache.kv_store import KVStore
from ..kv_cache.shared_memory import SharedMemory
from ..weight_sync.cuda_ipc import MappedMemory, export_handle
from .page_copy import Heads, slots_of
from .pool_writer import make_pool_writer
from .remote_pool import NotMappableError, their_slots, their_stacks
from .wire import DeviceMemory, HostMemory, HostProof, NixlMemory, PoolPlace

logger = logging.getLogger(__name__)

PROOF_BYTES = 32
# That others take to let go of memory that is given back; who is stopped meanwhile keeps it for longer.
UNMAP_WAIT_S = 5.0
POLL_S = 0.01
HOST_BLOCK_BYTES = 2 << 20
DEVICE_BLOCK_BYTES = 1 << 30
DESCRIPTOR_PATH = re.compile(r"/proc/\d+/fd/\d+")


class SharedExport:
    """`ExportedMemory` that others on this host map."""

    transport = "shared"

    def __init__(self, kv_store: KVStore) -> None:
        self._kv_store = kv_store
        content = secrets.token_bytes(PROOF_BYTES)
        self._proof_file = SharedMemory(PROOF_BYTES, "waybill-same-host")
        self._proof_file.tensor[:] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        self._proof = HostProof(self._proof_file.path, content)

    @property
    def block_bytes(self) -> int:
        return HOST_BLOCK_BYTES if self._kv_store.memory.device.type == "cpu" else DEVICE_BLOCK_BYTES

    def describe(self) -> HostMemory | DeviceMemory:
        store = self._kv_store
        if store.shared is not None:
            return HostMemory(self._proof, store.shared.path)
        return DeviceMemory(self._proof, *export_handle(store.memory))

    def withdraw(self, has_holders: Callable[[], bool]) -> None:
        """A device's memory would stay taken as long as it is mapped."""
        end = time.monotonic() + UNMAP_WAIT_S
        while has_holders():
            if time.monotonic() > end:
                logger.warning("another engine still has the KV cache mapped: its memory is not free yet")
                return
            time.sleep(POLL_S)


class MappedPool:
    """`RemotePool` that this process maps.

    Raises:
        NotMappableError: it is on another host or of another user, the devices do not reach each other, or it is not what
            this side's pool is.
    """

    def __init__(self, place: PoolPlace, kv_store: KVStore, page_size: int) -> None:
        if isinstance(place.memory, NixlMemory):
            raise NotMappableError("the prefill's side has --disaggregation-transport nixl")
        check_same_host(place.memory.proof)
        stacks = their_stacks(place, kv_store)
        on_host = kv_store.memory.device.type == "cpu"
        if on_host != isinstance(place.memory, HostMemory):
            raise NotMappableError("one pool is on the host, the other is not")
        self._num_slots = stacks[0].shape[1]
        self._page_sizes = (place.page_size, page_size)
        self._memory: MappedMemory | None = None
        whole: np.ndarray | torch.Tensor
        try:
            if isinstance(place.memory, HostMemory):
                whole = map_file(place.memory.path, place.num_bytes)
            else:
                self._memory = MappedMemory(place.memory.handle, kv_store.memory.device)
                whole = self._memory.tensor(place.memory.offset, place.num_bytes)
            self._writer = make_pool_writer(kv_store)
            self._sources = self._writer.sources(stacks, whole)
        except (OSError, RuntimeError, ValueError) as error:
            if self._memory is not None:
                self._memory.close()
            raise NotMappableError(str(error)) from error

    def read(self, their_pages: np.ndarray, start: int, end: int, theirs: Heads) -> None:
        """It is at hand."""

    def copy(self, their_pages: np.ndarray, pages: np.ndarray, start: int, end: int, theirs: Heads, ours: Heads) -> int:
        there = their_slots(their_pages, start, end, self._page_sizes[0], self._num_slots)
        here = slots_of(pages, start, end, self._page_sizes[1])
        return self._writer.write(self._sources, there, here, theirs, ours)

    def close(self) -> None:
        """A host's mapping ends with the last array on it."""
        self._sources = []
        if self._memory is not None:
            self._memory.close()


def check_same_host(proof: HostProof) -> None:
    """Whether both processes see the same memory.

    Raises:
        NotMappableError: they do not.
    """
    try:
        with open_descriptor(proof.path) as file:
            found = file.read(PROOF_BYTES)
    except OSError as error:
        raise NotMappableError(f"not on this host, or not of this user: {error}") from error
    if len(proof.content) != PROOF_BYTES or found != proof.content:
        raise NotMappableError("not on this host")


def open_descriptor(path: str) -> io.FileIO:
    """Another process's memory file.

    Raises:
        OSError: it cannot be opened, or is none.
    """
    if not DESCRIPTOR_PATH.fullmatch(path):
        raise OSError(f"{path!r} is no descriptor of a process")
    return io.FileIO(path)


def map_file(path: str, num_bytes: int) -> np.ndarray:
    """uint8 [num_bytes], to read.

    Raises:
        OSError, ValueError: it is none, or shorter.
    """
    with open_descriptor(path) as file:
        memory = mmap.mmap(file.fileno(), num_bytes, prot=mmap.PROT_READ)
    return np.frombuffer(memory, dtype=np.uint8)
