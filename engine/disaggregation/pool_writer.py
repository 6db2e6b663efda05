"""Rows of another memory into this rank's pool: heads `theirs` of slots there become heads `ours` of slots here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from ...parallel.host_to_device import to_device
from ..kv_cache.kv_store import KVStore, StackPlace
from .page_copy import Heads, as_rows, entry_bytes, host_bytes
from .row_copy import as_words, select_copy_rows, select_heads
from .run_copy import is_whole, select_copy_runs
from .slot_runs import slot_runs

# Fewest slots that a run has on average where numpy copies it faster than rows one by one.
HOST_RUN = 8
# Each costs the host some ten microseconds to have it done by a device's copy engine; for more, a kernel is faster.
MAX_RUNS = 32


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
        self._device = kv_store.memory.device
        self._targets = [stack.of(kv_store.memory) for stack in kv_store.stacks]
        self._copy_rows = select_copy_rows(self._device)
        self._copy_runs = select_copy_runs(self._device)
        self._stream = torch.cuda.Stream(self._device)

    def sources(self, stacks: Sequence[StackPlace], memory: Any) -> list[Any]:
        return [stack.of(memory) for stack in stacks]

    def write(self, sources: Sequence[Any], there: np.ndarray, here: np.ndarray, theirs: Heads, ours: Heads) -> int:
        pairs, runs = list(zip(sources, self._targets, strict=True)), slot_runs(there, here)
        try:
            if len(runs) <= MAX_RUNS and all(is_whole(one, theirs) and is_whole(other, ours) for one, other in pairs):
                torch.cuda.set_device(self._device)
                for source, target in pairs:
                    self._copy_runs(source, target, runs, self._stream.cuda_stream)
            else:
                self._write_rows(pairs, there, here, theirs, ours)
        finally:
            # The memory there, and here, may be given away as soon as this ends, by an error as well.
            self._stream.synchronize()
        return len(there) * sum(source.shape[0] * entry_bytes(source[0], theirs) for source in sources)

    @torch.inference_mode()
    def _write_rows(
        self, pairs: Sequence[tuple[Any, Any]], there: np.ndarray, here: np.ndarray, theirs: Heads, ours: Heads
    ) -> None:
        with torch.cuda.stream(self._stream):
            slots = to_device(np.stack((there, here)), self._device)
            for source, target in pairs:
                rows, others = as_words(select_heads(source, theirs), select_heads(target, ours))
                self._copy_rows(rows, others, slots[0], slots[1])


def make_pool_writer(kv_store: KVStore) -> PoolWriter:
    """The one for pools on this device."""
    return HostWriter(kv_store) if kv_store.memory.device.type == "cpu" else DeviceWriter(kv_store)
