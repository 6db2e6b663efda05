"""The transport `nixl`, between hosts: a rank of a decode's side reads the pool of a prefill's rank, one-sidedly, over UCX.

What is read goes to a memory beside the pool first, and from there to its pages while nobody drops the request. So a read
that hangs writes to no page that somebody else has by then, and who drops a request waits for no network.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..kv_cache.kv_store import KVStore, StackPlace
from .nixl_agent import Agent, NixlError, Read, device_number
from .page_copy import Heads, slots_of
from .pool_writer import PoolWriter, make_pool_writer
from .read_plan import plan_reads, room_for
from .remote_pool import NotMappableError, PoolLostError, their_slots, their_stacks
from .wire import NixlMemory, PoolPlace

logger = logging.getLogger(__name__)

READ_TIMEOUT_S = 5.0
POLL_S = 1e-4
HOST_BLOCK_BYTES = 4 << 20
DEVICE_BLOCK_BYTES = 64 << 20


def block_bytes_of(kv_store: KVStore) -> int:
    return HOST_BLOCK_BYTES if kv_store.memory.device.type == "cpu" else DEVICE_BLOCK_BYTES


class NixlExport:
    """`ExportedMemory` that other agents read. There is an agent for each generation of the pool: who still knows one whose
    memory has been given back finds nobody."""

    transport = "nixl"

    def __init__(self, kv_store: KVStore, make_agent: Callable[[], Agent]) -> None:
        self._kv_store = kv_store
        self._make_agent = make_agent
        self._lock = threading.Lock()
        # At once, so that an engine does not start where there is no NIXL.
        self._agent: Agent | None = make_agent()

    @property
    def block_bytes(self) -> int:
        return block_bytes_of(self._kv_store)

    def describe(self) -> NixlMemory:
        with self._lock:
            if self._kv_store.generation == 0:
                raise NixlError("the memory has been given back")
            agent = self._agent = self._agent or self._make_agent()
            memory = self._kv_store.memory
            agent.register(memory)
            return NixlMemory(agent.name, agent.metadata(), memory.data_ptr(), device_number(memory))

    def withdraw(self, has_holders: Callable[[], bool]) -> None:
        """A read that came later would find other memory, or none."""
        with self._lock:
            if self._agent is not None:
                self._agent.close()
            self._agent = None


class NixlReader:
    """Opens pools of other agents for this rank's."""

    def __init__(self, kv_store: KVStore, page_size: int, agent: Agent) -> None:
        self._kv_store = kv_store
        self._page_size = page_size
        self._agent = agent
        self._writer = make_pool_writer(kv_store)
        # Of which a read goes on that nobody waits for any more.
        self._left: list[NixlPool] = []

    def open(self, place: PoolPlace) -> NixlPool:
        """
        Raises:
            NotMappableError: it cannot be read, or is not what this side's pool is.
        """
        if not isinstance(place.memory, NixlMemory):
            raise NotMappableError("the prefill's side offers no memory to read")
        self._left = [pool for pool in self._left if not pool.is_closed()]
        if any(pool.remote == place.memory.agent for pool in self._left):
            raise NotMappableError("a read that was begun earlier has not ended")
        stacks = their_stacks(place, self._kv_store)
        try:
            return NixlPool(place, place.memory, stacks, self)
        except NixlError as error:
            raise NotMappableError(str(error)) from error

    @property
    def agent(self) -> Agent:
        return self._agent

    @property
    def writer(self) -> PoolWriter:
        return self._writer

    @property
    def page_size(self) -> int:
        return self._page_size

    def make_room(self, stacks: Sequence[StackPlace]) -> torch.Tensor:
        size = room_for(stacks, block_bytes_of(self._kv_store))
        return torch.empty(size, dtype=torch.uint8, device=self._kv_store.memory.device)

    def leave(self, pool: NixlPool) -> None:
        """It is closed when its read is over."""
        logger.warning("a read of another engine's pool goes on: its memory is kept until it ends")
        self._left.append(pool)


class NixlPool:
    """`RemotePool` of another agent.

    Raises:
        NixlError: it cannot be reached.
    """

    def __init__(self, place: PoolPlace, memory: NixlMemory, stacks: Sequence[StackPlace], reader: NixlReader) -> None:
        self.remote = memory.agent
        self._memory = memory
        self._page_size = place.page_size
        self._stacks = stacks
        self._reader = reader
        self._agent = reader.agent
        self._room = reader.make_room(stacks)
        self._read: Read | None = None
        self._sources: list[object] = []
        self._heads: Heads = None
        self._registration = self._agent.register(self._room)
        try:
            found = self._agent.add(memory.metadata)
            if found != self.remote:
                self._agent.remove(found)
                raise NixlError(f"the agent is {found!r}, not {self.remote!r}")
        except NixlError:
            self._registration.close()
            raise

    def read(self, their_pages: np.ndarray, start: int, end: int, theirs: Heads) -> None:
        slots = their_slots(their_pages, start, end, self._page_size, self._stacks[0].shape[1])
        plan = plan_reads(self._stacks, slots, theirs)
        if plan.parts[-1].offset + plan.parts[-1].num_bytes > self._room.nbytes:
            raise ValueError(f"{end - start} positions at once are more than this side has room for")
        ours = np.stack([self._room.data_ptr() + plan.ours, plan.num_bytes], axis=1)
        from_there = np.stack([self._memory.address + plan.theirs, plan.num_bytes], axis=1)
        try:
            self._read = self._agent.read(self.remote, self._room, ours, from_there, self._memory.device)
            self._wait(self._read)
            self._read.close()
        except NixlError as error:
            raise PoolLostError(str(error)) from error
        self._read = None
        room = self._room.numpy() if self._room.device.type == "cpu" else self._room
        self._sources, self._heads = self._reader.writer.sources(plan.parts, room), plan.heads

    @staticmethod
    def _wait(read: Read) -> None:
        """
        Raises:
            NixlError: it has failed.
            PoolLostError: it goes on.
        """
        give_up_at = time.monotonic() + READ_TIMEOUT_S
        while not read.is_done():
            if time.monotonic() > give_up_at:
                raise PoolLostError(f"a read has not ended within {READ_TIMEOUT_S:g} s")
            time.sleep(POLL_S)

    def copy(self, their_pages: np.ndarray, pages: np.ndarray, start: int, end: int, theirs: Heads, ours: Heads) -> int:
        here = slots_of(pages, start, end, self._reader.page_size)
        return self._reader.writer.write(self._sources, np.arange(end - start), here, self._heads, ours)

    def close(self) -> None:
        if not self.is_closed():
            self._reader.leave(self)

    def is_closed(self) -> bool:
        """Whether all is given back, which is so once no read goes on."""
        try:
            if self._read is not None and not self._read.is_done():
                return False
        except NixlError:
            # It is over.
            pass
        try:
            if self._read is not None:
                self._read.close()
            self._registration.close()
            self._agent.remove(self.remote)
        except NixlError as error:
            logger.warning("what was read of another engine's pool could not be given back: %s", error)
        self._read, self._sources = None, []
        return True
