"""Rows of another memory into this rank's pool: heads `theirs` of slots there become heads `ours` of slots here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from ...parallel.host_to_device import to_device
from ..kv_cache.kv_store import KVStore, StackPlace
from .page_copy import Heads, as_rows, host_bytes
from .row_copy import as_words, select_copy_rows, select_heads
from .run_copy import has_whole_rows, select_copy_runs
from .slot_runs import slot_runs

# Fewest slots that a run has on average where a copy of each run is faster than one of each row: on the host and, where
# it costs the host some microseconds to have it done, on a device.
HOST_RUN, DEVICE_RUN = 8, 64


class PoolWriter(Protocol):
    def sources(self, stacks: Sequence[StackPlace], memory: Any) -> list[Any]:
        """Views of what is at these places of a memory: uint8 [bytes], an array of the host or a tensor of the device."""
        ...

    def write(self, sources: Sequence[Any], there: np.ndarray, here: np.ndarray, theirs: Heads, ours: Heads) -> int:
        """Slots `there` of the sources to slots `here` of the pool, [n] int64 each. Returns bytes, once they are there."""
        ...


class HostWriter:
    """By numpy, which works on one core and lets the interpreter go on with the step thread."""

    def __init__(self, kv_store: KVStore) -> None:
        self._kv_store = kv_store

    def sources(self, stacks: Sequence[StackPlace], memory: Any) -> list[Any]:
        return [as_rows(stack, memory) for stack in stacks]

    def write(self, sources: Sequence[Any], there: np.ndarray, here: np.ndarray, theirs: Heads, ours: Heads) -> int:
        num_bytes, own, runs = 0, host_bytes(self._kv_store), slot_runs(there, here)
        for source, stack in zip(sources, self._kv_store.stacks, strict=True):
            rows, target = (_heads_of(array, heads) for array, heads in ((source, theirs), (as_rows(stack, own), ours)))
            if len(there) >= HOST_RUN * len(runs):
                for first, own_first, num_slots in runs:
                    target[:, own_first : own_first + num_slots] = rows[:, first : first + num_slots]
            else:
                target[:, here] = rows[:, there]
            num_bytes += rows.shape[0] * len(there) * rows[0, 0].nbytes
        return num_bytes


def _heads_of(array: np.ndarray, heads: Heads) -> np.ndarray:
    """Of [layers, slots, heads, bytes] or, where there are none, [layers, slots, bytes]."""
    return array if heads is None or array.ndim == 3 else array[:, :, heads[0] : heads[1]]


class DeviceWriter:
    """By the device, on a stream of its own: rows go straight from the one memory to the other."""

    def __init__(self, kv_store: KVStore) -> None:
        self._kv_store = kv_store
        self._device = kv_store.memory.device
        self._copy_rows = select_copy_rows(self._device)
        self._copy_runs = select_copy_runs(self._device)
        self._stream = torch.cuda.Stream(self._device)

    def sources(self, stacks: Sequence[StackPlace], memory: Any) -> list[Any]:
        return [stack.of(memory) for stack in stacks]

    @torch.inference_mode()
    def write(self, sources: Sequence[Any], there: np.ndarray, here: np.ndarray, theirs: Heads, ours: Heads) -> int:
        num_bytes, runs, slots = 0, slot_runs(there, here), None
        with torch.cuda.stream(self._stream):
            for source, stack in zip(sources, self._kv_store.stacks, strict=True):
                target = stack.of(self._kv_store.memory)
                rows, others = as_words(select_heads(source, theirs), select_heads(target, ours))
                if len(there) >= DEVICE_RUN * len(runs) and has_whole_rows(rows) and has_whole_rows(others):
                    self._copy_runs(rows, others, runs)
                else:
                    if slots is None:
                        slots = to_device(np.stack((there, here)), self._device)
                    self._copy_rows(rows, others, slots[0], slots[1])
                num_bytes += len(there) * rows.shape[0] * rows.shape[2] * rows.itemsize
        # The memory there may be given away as soon as this returns.
        self._stream.synchronize()
        return num_bytes


def make_pool_writer(kv_store: KVStore) -> PoolWriter:
    """The one for pools on this device."""
    return HostWriter(kv_store) if kv_store.memory.device.type == "cpu" else DeviceWriter(kv_store)
