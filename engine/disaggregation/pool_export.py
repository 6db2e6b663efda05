"""A rank's pool of a prefill's side, for ranks of another engine that copy from it by themselves.

For each question they learn which positions may be copied. Nobody holds a page for a copy that is under way: what was
copied counts when a later question is answered under the same lease, for a lease's pages are nobody else's while it lasts.
So a side that was stopped in between learns that its copy is worth nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ..kv_cache.kv_store import KVStore
from .wire import PoolMemory, PoolPlace


class ExportedMemory(Protocol):
    """How others get at the pool's memory."""

    @property
    def transport(self) -> str: ...

    @property
    def block_bytes(self) -> int:
        """Of one answer. Who copies does so before it looks at its sockets again."""
        ...

    def describe(self) -> PoolMemory:
        """On the server's thread, once for each generation of the pool.

        Raises:
            OSError, RuntimeError: others cannot get at it.
        """
        ...

    def withdraw(self, has_holders: Callable[[], bool]) -> None:
        """On the step thread, before the memory is given back: nobody reads it any more when this returns. The generation
        is 0 by now, which the others are told when they next ask who is there."""
        ...


class PoolExport:
    """Where the pool is."""

    def __init__(self, kv_store: KVStore, page_size: int, memory: ExportedMemory) -> None:
        self._kv_store = kv_store
        self._page_size = page_size
        self._memory = memory
        self._told: tuple[int, PoolMemory] | None = None
        # Whether anybody has the pool mapped.
        self.has_holders: Callable[[], bool] = lambda: False
        kv_store.before_release = lambda: memory.withdraw(self.has_holders)

    @property
    def generation(self) -> int:
        return self._kv_store.generation

    @property
    def page_size(self) -> int:
        return self._page_size

    @property
    def transport(self) -> str:
        return self._memory.transport

    @property
    def block_bytes(self) -> int:
        return self._memory.block_bytes

    def place(self, key: str, attempt: int) -> PoolPlace:
        """The answer to a question of that key. Not while the memory is given back.

        Raises:
            OSError, RuntimeError: others cannot get at it.
        """
        store, generation = self._kv_store, self.generation
        if self._told is None or self._told[0] != generation:
            self._told = (generation, self._memory.describe())
        stacks = [(stack.offset, list(stack.shape)) for stack in store.stacks]
        return PoolPlace(key, attempt, generation, self._page_size, store.memory.nbytes, stacks, self._told[1])
