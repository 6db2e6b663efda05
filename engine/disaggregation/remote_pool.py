"""The pool of a prefill's rank as a rank of a decode's side has it: mapped, or read over a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from ..kv_cache.kv_store import KVStore, StackPlace
from .page_copy import Heads, slots_of
from .wire import PoolPlace


class NotMappableError(Exception):
    """A pool that this process cannot reach."""


class PoolLostError(Exception):
    """A pool that could be reached before, and cannot any more."""


class RemotePool(Protocol):
    """Of one rank. Called on the client's thread."""

    def read(self, their_pages: np.ndarray, start: int, end: int, theirs: Heads) -> None:
        """Before each `copy` of the same positions: whatever has to come over a network first, to memory of its own.

        Raises:
            ValueError: there are no such pages there.
            PoolLostError: they cannot be had.
        """
        ...

    def copy(self, their_pages: np.ndarray, pages: np.ndarray, start: int, end: int, theirs: Heads, ours: Heads) -> int:
        """Positions `[start, end)` of a request: `their_pages` are those that these are on there, `pages` all that the
        request has here. Returns bytes.

        Raises:
            ValueError: there are no such pages there.
        """
        ...

    def close(self) -> None: ...


# Of a place that a prefill's rank has told.
OpenPool = Callable[[PoolPlace], RemotePool]


def their_stacks(place: PoolPlace, kv_store: KVStore) -> list[StackPlace]:
    """Where the pool has what this rank's has.

    Raises:
        NotMappableError: it is not what this side's pool is.
    """
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
    return theirs


def their_slots(their_pages: np.ndarray, start: int, end: int, page_size: int, num_slots: int) -> np.ndarray:
    """KV slots there, [n] int64, of a pool of `num_slots`.

    Raises:
        ValueError: the other side names pages that it does not have.
    """
    skipped = start // page_size * page_size
    if end - skipped > len(their_pages) * page_size:
        raise ValueError(f"{len(their_pages)} pages for positions {start} .. {end}")
    slots = slots_of(their_pages, start - skipped, end - skipped, page_size)
    if len(slots) and not 0 <= slots.min() <= slots.max() < num_slots:
        raise ValueError("pages that the pool does not have")
    return slots
