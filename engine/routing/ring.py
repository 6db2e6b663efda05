"""A shared-memory ring of steps' routing, from the rank that records to its output processor.

One writer, one reader, two counters. Slot `seq % num_slots` holds step `seq` from `publish` until `mark_filed`; that a
step was published is told by its `StepRecord`, so the reader never polls. The memory is a memfd: it has no name, and is
gone when the last process that maps it is.

Layout of a slot: a step as `RouteGeometry` describes it, for the rows that the step has room for, so that each layer's
write, and the copy of all layers from a device, is one contiguous block. The header says how many rows that is.
"""

from __future__ import annotations

import logging
import mmap
import os
import time
from typing import Any

import numpy as np

from .geometry import WEIGHT_DTYPES, RouteGeometry

logger = logging.getLogger(__name__)

PAGE_BYTES = 4096
# Header words: how many steps were filed, then each slot's number of rows.
FILED_WORD = 0
FIRST_ROWS_WORD = 1
POLL_S = 0.0002


def header_bytes(num_slots: int) -> int:
    """Room for the counters, in whole pages, so that the slots begin on one."""
    return -(-8 * (FIRST_ROWS_WORD + num_slots) // PAGE_BYTES) * PAGE_BYTES


def ring_bytes(geometry: RouteGeometry, num_slots: int) -> int:
    return header_bytes(num_slots) + num_slots * geometry.slot_bytes


class RouteRing:
    """Either end of the ring. Made by `create` (writer) or `attach` (reader)."""

    def __init__(self, fd: int, geometry: RouteGeometry, num_slots: int) -> None:
        self.fd = fd
        self.geometry = geometry
        self.num_slots = num_slots
        self._memory = mmap.mmap(fd, ring_bytes(geometry, num_slots))
        self._header = np.frombuffer(self._memory, dtype=np.int64, count=FIRST_ROWS_WORD + num_slots)
        self._slots = np.frombuffer(self._memory, dtype=np.uint8, offset=header_bytes(num_slots)).reshape(num_slots, -1)
        self._next_seq = 0
        self.num_waits = 0
        self.wait_s = 0.0

    @staticmethod
    def create(geometry: RouteGeometry, num_slots: int) -> RouteRing:
        fd = os.memfd_create("waybill-route-ring")
        os.ftruncate(fd, ring_bytes(geometry, num_slots))
        return RouteRing(fd, geometry, num_slots)

    @staticmethod
    def attach(path: str, geometry: RouteGeometry, num_slots: int) -> RouteRing:
        """Map the writer's memory through its `path` (see there)."""
        return RouteRing(os.open(path, os.O_RDWR), geometry, num_slots)

    @property
    def path(self) -> str:
        """How another process of this user on this host opens the memory, while this one lives."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    @property
    def num_filed(self) -> int:
        """Steps that the reader is done with."""
        return int(self._header[FILED_WORD])

    @property
    def num_occupied(self) -> int:
        """Steps that were acquired and not filed yet; for the writer."""
        return self._next_seq - self.num_filed

    def acquire(self, timeout_s: float) -> int:
        """The next step's sequence number, once its slot is free.

        Raises:
            TimeoutError: the reader has not filed the oldest step within `timeout_s`.
        """
        seq = self._next_seq
        if seq - self.num_filed >= self.num_slots:
            self._wait_for_slot(seq, timeout_s)
        self._next_seq += 1
        return seq

    def _wait_for_slot(self, seq: int, timeout_s: float) -> None:
        if self.num_waits == 0:
            logger.warning("the routing ring is full: waiting for the output processor to file (counted from here on)")
        began = time.monotonic()
        while seq - self.num_filed >= self.num_slots:
            if time.monotonic() - began > timeout_s:
                raise TimeoutError(f"routing ring: step {seq - self.num_slots} was not filed within {timeout_s} s")
            time.sleep(POLL_S)
        self.num_waits += 1
        self.wait_s += time.monotonic() - began

    @property
    def memory(self) -> np.ndarray:
        """All slots, as bytes: what a device's driver must know to copy into them by itself."""
        return self._slots

    def step(self, seq: int, num_rows: int) -> np.ndarray:
        """The writable bytes of an acquired step."""
        assert num_rows <= self.geometry.max_tokens, "the step is larger than a ring slot"
        self._header[FIRST_ROWS_WORD + seq % self.num_slots] = num_rows
        return self._slots[seq % self.num_slots, : self.geometry.step_bytes(num_rows)]

    def slot(self, seq: int, num_rows: int) -> np.ndarray:
        """The ids `[moe_layers, num_rows, top_k]` of an acquired step, writable."""
        raw = self.step(seq, num_rows)[self.geometry.blocks(num_rows)[0]]
        return self._shaped(raw.view(self.geometry.dtype), num_rows)

    def _shaped(self, values: np.ndarray, num_rows: int) -> np.ndarray:
        return values.reshape(self.geometry.num_moe_layers, num_rows, self.geometry.top_k)

    def rows(self, seq: int, first_row: int, num_rows: int) -> np.ndarray:
        """The reader's view of the ids `[moe_layers, num_rows, top_k]` of a published step, from row `first_row` on."""
        return self._published(seq, first_row, num_rows, 0, self.geometry.dtype)

    def weights(self, seq: int, first_row: int, num_rows: int) -> np.ndarray | None:
        """The same of its combine weights, if they are recorded."""
        if not self.geometry.has_weights:
            return None
        return self._published(seq, first_row, num_rows, 1, WEIGHT_DTYPES[self.geometry.weights_dtype])

    def _published(self, seq: int, first_row: int, num_rows: int, block: int, dtype: np.dtype[Any]) -> np.ndarray:
        rows_there = int(self._header[FIRST_ROWS_WORD + seq % self.num_slots])
        assert first_row + num_rows <= rows_there, "the record speaks of rows that the step did not have"
        raw = self._slots[seq % self.num_slots][self.geometry.blocks(rows_there)[block]]
        return self._shaped(raw.view(dtype), rows_there)[:, first_row : first_row + num_rows]

    def mark_filed(self, seq: int) -> None:
        """Give the slot of `seq` back; steps are filed in order."""
        assert seq == self.num_filed, f"step {seq} filed out of order, {self.num_filed} is next"
        self._header[FILED_WORD] = seq + 1
