"""Pages without a socket, within a host: a rank of a decode's side maps the pool of a prefill's rank and copies from it.

The prefill's side says where its pool is (`PoolExport`), and for each question which positions may be copied. Nobody holds
a page there for a copy that is under way: what was copied counts when a later question is answered under the same lease,
for a lease's pages are nobody else's while it lasts. So a side that was stopped in between learns that its copy is worth
nothing.
"""

from __future__ import annotations

import io
import logging
import mmap
import re
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from ..kv_cache.kv_store import KVStore, StackPlace
from ..kv_cache.shared_memory import SharedMemory
from ..weight_sync.cuda_ipc import MappedMemory, export_handle
from .page_copy import Heads, as_rows, host_bytes, slots_of
from .row_copy import as_words, select_copy_rows, select_heads
from .wire import DeviceMemory, PoolPlace

logger = logging.getLogger(__name__)

PROOF_BYTES = 32
# That others take to let go of memory that is given back; who is stopped meanwhile keeps it for longer.
UNMAP_WAIT_S = 5.0
POLL_S = 0.01
# Of one answer. A thread copies as much before it looks at its sockets again.
HOST_BLOCK_BYTES = 2 << 20
DEVICE_BLOCK_BYTES = 512 << 20
DESCRIPTOR_PATH = re.compile(r"/proc/\d+/fd/\d+")


class NotMappableError(Exception):
    """A pool that this process cannot reach."""


class PoolExport:
    """Where this rank's pool is."""

    def __init__(self, kv_store: KVStore, page_size: int) -> None:
        self._kv_store = kv_store
        self._page_size = page_size
        self._proof = secrets.token_bytes(PROOF_BYTES)
        self._proof_file = SharedMemory(PROOF_BYTES, "waybill-same-host")
        self._proof_file.tensor[:] = torch.frombuffer(bytearray(self._proof), dtype=torch.uint8)
        self._memory: tuple[int, str | DeviceMemory] | None = None
        # Whether anybody has the pool mapped.
        self.has_holders: Callable[[], bool] = lambda: False
        kv_store.before_release = self._wait_for_holders

    @property
    def generation(self) -> int:
        return self._kv_store.generation

    @property
    def page_size(self) -> int:
        return self._page_size

    def _wait_for_holders(self) -> None:
        """On the step thread, before a device's memory is given back: it would stay taken as long as it is mapped. The
        generation is 0 by now, which the others are told when they next ask who is there."""
        end = time.monotonic() + UNMAP_WAIT_S
        while self.has_holders():
            if time.monotonic() > end:
                logger.warning("another engine still has the KV cache mapped: its memory is not free yet")
                return
            time.sleep(POLL_S)

    @property
    def block_bytes(self) -> int:
        return HOST_BLOCK_BYTES if self._kv_store.memory.device.type == "cpu" else DEVICE_BLOCK_BYTES

    def place(self, key: str, attempt: int) -> PoolPlace:
        """The answer to a question of that key. Not while the memory is given back.

        Raises:
            RuntimeError: the driver does not share it.
        """
        store, generation = self._kv_store, self.generation
        if self._memory is None or self._memory[0] != generation:
            if store.shared is not None:
                self._memory = (generation, store.shared.path)
            else:
                self._memory = (generation, DeviceMemory(*export_handle(store.memory)))
        stacks = [(stack.offset, list(stack.shape)) for stack in store.stacks]
        return PoolPlace(
            key,
            attempt,
            generation,
            self._proof_file.path,
            self._proof,
            self._page_size,
            store.memory.nbytes,
            stacks,
            self._memory[1],
        )


class MappedPool(Protocol):
    """The pool of one rank of the prefill's side."""

    def copy(self, their_pages: np.ndarray, pages: np.ndarray, start: int, end: int, theirs: Heads, ours: Heads) -> int:
        """Positions `[start, end)` of a request: `their_pages` are those that these are on there, `pages` all that the
        request has here. Returns bytes.

        Raises:
            ValueError: there are no such pages there.
        """
        ...

    def close(self) -> None: ...


def map_pool(place: PoolPlace, kv_store: KVStore, page_size: int) -> MappedPool:
    """
    Raises:
        NotMappableError: it is on another host or of another user, the devices do not reach each other, or it is not what
            this side's pool is.
    """
    check_same_host(place)
    own = kv_store.stacks
    theirs = [
        StackPlace(offset, tuple(shape), stack.dtype) for (offset, shape), stack in zip(place.stacks, own, strict=False)
    ]
    alike = [
        (one.shape[0], one.shape[-1], len(one.shape)) == (other.shape[0], other.shape[-1], len(other.shape))
        for one, other in zip(theirs, own, strict=False)
    ]
    if len(place.stacks) != len(own) or not all(alike):
        raise NotMappableError("its tensors are others")
    if any(one.offset < 0 or one.offset + one.num_bytes > place.num_bytes for one in theirs):
        raise NotMappableError("its tensors are not in it")
    on_host = kv_store.memory.device.type == "cpu"
    if on_host != isinstance(place.memory, str):
        raise NotMappableError("one pool is on the host, the other is not")
    kind = HostMappedPool if on_host else DeviceMappedPool
    try:
        return kind(place, theirs, kv_store, page_size)
    except (OSError, RuntimeError, ValueError) as error:
        raise NotMappableError(str(error)) from error


def check_same_host(place: PoolPlace) -> None:
    """Whether both processes see the same memory.

    Raises:
        NotMappableError: they do not.
    """
    try:
        with open_descriptor(place.proof_path) as file:
            found = file.read(PROOF_BYTES)
    except OSError as error:
        raise NotMappableError(f"not on this host, or not of this user: {error}") from error
    if len(place.proof) != PROOF_BYTES or found != place.proof:
        raise NotMappableError("not on this host")


def open_descriptor(path: str) -> io.FileIO:
    """Another process's memory file.

    Raises:
        OSError: it cannot be opened, or is none.
    """
    if not DESCRIPTOR_PATH.fullmatch(path):
        raise OSError(f"{path!r} is no descriptor of a process")
    return io.FileIO(path)


class HostMappedPool:
    """By numpy, which works on one core and lets the interpreter go on with the step thread."""

    def __init__(self, place: PoolPlace, stacks: Sequence[StackPlace], kv_store: KVStore, page_size: int) -> None:
        assert isinstance(place.memory, str)
        with open_descriptor(place.memory) as file:
            memory = mmap.mmap(file.fileno(), place.num_bytes, prot=mmap.PROT_READ)
        whole = np.frombuffer(memory, dtype=np.uint8)
        self._sources = [as_rows(stack, whole) for stack in stacks]
        self._kv_store = kv_store
        self._page_sizes = (place.page_size, page_size)

    def copy(self, their_pages: np.ndarray, pages: np.ndarray, start: int, end: int, theirs: Heads, ours: Heads) -> int:
        there, here = slots_on_both(their_pages, pages, start, end, self._page_sizes, self._sources[0].shape[1])
        num_bytes, own = 0, host_bytes(self._kv_store)
        for source, stack in zip(self._sources, self._kv_store.stacks, strict=True):
            target = as_rows(stack, own)
            rows = source[:, there] if theirs is None or source.ndim == 3 else source[:, there, theirs[0] : theirs[1]]
            if ours is None or target.ndim == 3:
                target[:, here] = rows
            else:
                target[:, here, ours[0] : ours[1]] = rows
            num_bytes += rows.nbytes
        return num_bytes

    def close(self) -> None:
        """The mapping ends with the last array on it."""
        self._sources = []


def slots_on_both(
    their_pages: np.ndarray, pages: np.ndarray, start: int, end: int, page_sizes: tuple[int, int], num_slots: int
) -> tuple[np.ndarray, np.ndarray]:
    """KV slots there and here, [n] int64 each.

    Raises:
        ValueError: the other side names pages that it does not have.
    """
    skipped = start // page_sizes[0] * page_sizes[0]
    if end - skipped > len(their_pages) * page_sizes[0]:
        raise ValueError(f"{len(their_pages)} pages for positions {start} .. {end}")
    there = slots_of(their_pages, start - skipped, end - skipped, page_sizes[0])
    if len(there) and not 0 <= there.min() <= there.max() < num_slots:
        raise ValueError("pages that the pool does not have")
    return there, slots_of(pages, start, end, page_sizes[1])


class DeviceMappedPool:
    """By the device, on a stream of its own: rows go straight from one pool's memory to the other's."""

    def __init__(self, place: PoolPlace, stacks: Sequence[StackPlace], kv_store: KVStore, page_size: int) -> None:
        assert isinstance(place.memory, DeviceMemory)
        self._device = kv_store.memory.device
        self._kv_store = kv_store
        self._memory = MappedMemory(place.memory.handle, self._device)
        try:
            whole = self._memory.tensor(place.memory.offset, place.num_bytes)
            self._sources = [stack.of(whole) for stack in stacks]
            self._copy_rows = select_copy_rows(self._device)
        except BaseException:
            self._memory.close()
            raise
        self._page_sizes = (place.page_size, page_size)
        self._stream = torch.cuda.Stream(self._device)
        # By the heads there and here: of each stack, both pools as words.
        self._words: dict[tuple[Heads, Heads], list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def _words_of(self, theirs: Heads, ours: Heads) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if (theirs, ours) not in self._words:
            targets = [stack.of(self._kv_store.memory) for stack in self._kv_store.stacks]
            self._words[theirs, ours] = [
                as_words(select_heads(source, theirs), select_heads(target, ours))
                for source, target in zip(self._sources, targets, strict=True)
            ]
        return self._words[theirs, ours]

    @torch.inference_mode()
    def copy(self, their_pages: np.ndarray, pages: np.ndarray, start: int, end: int, theirs: Heads, ours: Heads) -> int:
        slots = slots_on_both(their_pages, pages, start, end, self._page_sizes, self._sources[0].shape[1])
        num_bytes = 0
        with torch.cuda.stream(self._stream):
            there, here = torch.from_numpy(np.stack(slots)).to(self._device)
            for source, target in self._words_of(theirs, ours):
                self._copy_rows(source, target, there, here)
                num_bytes += len(there) * source.shape[0] * source.shape[2] * source.itemsize
        # The pages there may be given away when the next question is answered.
        self._stream.synchronize()
        return num_bytes

    def close(self) -> None:
        self._sources, self._words = [], {}
        self._memory.close()
