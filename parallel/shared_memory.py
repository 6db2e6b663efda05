"""Collectives of CPU tensors between the processes of one host, through memory that all of them map: a rank writes its part
there and reads the others' in place. gloo, whose twins these are, sends it through sockets.

Call number c of an axis uses buffer c mod 2, and begins when every rank has begun call c - 1: then all have read what call
c - 2 left in that buffer. So the ranks meet once in a call, and not again at its end. What is larger than a slot goes in
parts, a call each.

Legend: n ranks.
"""

from __future__ import annotations

import mmap
import os
import platform
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from .collectives import all_gather, gather_bytes, sum_of_terms

if TYPE_CHECKING:
    from .mesh import Axis

# Where a processor's stores are seen in their order, so that a counter may follow data without a fence.
ORDERED_MACHINES = ("x86_64", "AMD64")
SLOT_BYTES = 1 << 20
# A counter has a cache line of its own.
LINE_BYTES = 64
WORD_BYTES = 8
# Looks at a counter, with other threads let run between them, before a rank begins to sleep.
NUM_SPINS = 200
# A sleep is this part of the time waited so far, within bounds.
SLEEP_PART = 1 / 16
MIN_SLEEP_S, MAX_SLEEP_S = 20e-6, 1e-3
# Says that what a rank sends does not fit its slot.
TOO_LARGE = -1


class SharedMemory:
    """One rank's end of an axis. All ranks call its methods in the same order, with the same shapes and dtypes.

    Raises:
        TimeoutError: by each method, when another rank has not come in time.
    """

    def __init__(self, memory: mmap.mmap, rank: int, size: int, timeout_s: float) -> None:
        self._rank = rank
        self._size = size
        self._timeout_s = timeout_s
        self._counters = memoryview(memory)[: size * LINE_BYTES].cast("q")
        self._slots = torch.frombuffer(memory, dtype=torch.uint8, offset=size * LINE_BYTES).view(2, size, SLOT_BYTES)
        self._call = 0

    @staticmethod
    def of(axis: Axis, timeout_s: float) -> SharedMemory | None:
        """That of an axis whose ranks are on one host, made by all of them together. None, on all of them, where they
        cannot share memory."""
        descriptor, own_path = -1, ""
        if axis.rank == 0:
            descriptor = os.memfd_create("waybill-collectives", os.MFD_CLOEXEC)
            os.ftruncate(descriptor, memory_bytes(axis.size))
            own_path = f"/proc/{os.getpid()}/fd/{descriptor}"
        path = gather_bytes(own_path.encode(), axis)[0].decode()
        memory = _map(path, memory_bytes(axis.size))
        everyone_has = bool(all_gather(torch.tensor([memory is not None]), axis).all())
        if descriptor >= 0:
            os.close(descriptor)
        return SharedMemory(memory, axis.rank, axis.size, timeout_s) if everyone_has and memory is not None else None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum, in a tensor of its own: terms are added as a balanced tree, and 16-bit numbers are rounded once."""
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        own, total = x.contiguous().view(-1), out.view(-1)
        for part in _parts(own, SLOT_BYTES):
            _add(self._gathered(own[part]), total[part])
        return out

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's share of dim 0 of the sum, whose numbers are those of `all_reduce`."""
        shares = x.contiguous().unflatten(0, (self._size, -1))
        out = torch.empty_like(shares[self._rank])
        share, total = shares.flatten(1), out.view(-1)
        for part in _parts(total, SLOT_BYTES // self._size):
            of_all = self._gathered(share[:, part].contiguous().view(-1)).unflatten(1, (self._size, -1))
            _add(of_all[:, self._rank], total[part])
        return out

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """The ranks' tensors, one behind the other: [n, *shape]."""
        out = x.new_empty(self._size, *x.shape)
        own, rows = x.contiguous().view(-1), out.view(self._size, -1)
        for part in _parts(own, SLOT_BYTES):
            rows[:, part] = self._gathered(own[part])
        return out

    def gather(self, x: torch.Tensor) -> torch.Tensor | None:
        """As `all_gather`, on rank 0 alone; the others wait for nobody."""
        own = x.contiguous().view(-1)
        if self._rank == 0:
            return self.all_gather(x)
        for part in _parts(own, SLOT_BYTES):
            self._publish(self._begin(), own[part])
        return None

    def broadcast(self, x: torch.Tensor, source: int) -> torch.Tensor:
        """The tensor of rank `source`, in place on the others; that rank waits for nobody."""
        whole = x.contiguous()
        for part in _parts(whole.view(-1), SLOT_BYTES):
            values = whole.view(-1)[part]
            slots = self._begin()
            if self._rank == source:
                self._publish(slots, values)
            else:
                self._publish(slots, values[:0])
                self._wait_for((source,))
                values.copy_(_rows(slots, values)[source])
        return x if whole is x else x.copy_(whole)

    def exchange(self, x: torch.Tensor, send_sizes: Sequence[int], out: torch.Tensor) -> bool:
        """Rows of dim 0 to the ranks they are for, the first `send_sizes[0]` to rank 0 and so on; `out` gets what arrives
        in rank order. False, on all ranks, where what one of them sends is too large for its slot: nothing is exchanged."""
        header_bytes = WORD_BYTES * (self._size + 1)
        fits = header_bytes + x.nbytes <= SLOT_BYTES
        ends = torch.tensor(send_sizes, dtype=torch.int64).cumsum(0) * (x[:1].numel() * x.itemsize)
        header = torch.cat([torch.tensor([0 if fits else TOO_LARGE]), ends])
        body = x.contiguous().view(-1).view(torch.uint8) if fits else x.new_empty(0, dtype=torch.uint8)
        slots = self._gathered(torch.cat([header.view(torch.uint8), body]), whole_slots=True)
        bounds = slots[:, :header_bytes].view(torch.int64)
        if bool((bounds[:, 0] == TOO_LARGE).any()):
            return False
        firsts, stops = (bounds[:, self._rank + side].tolist() for side in (0, 1))
        arrived = [
            slots[source, header_bytes + first : header_bytes + stop]
            for source, (first, stop) in enumerate(zip(firsts, stops, strict=True))
        ]
        torch.cat(arrived, out=out.view(-1).view(torch.uint8))
        return True

    def _gathered(self, own: torch.Tensor, *, whole_slots: bool = False) -> torch.Tensor:
        """All ranks' numbers [n, size] where they lie, until the next call but one; or whole slots, of which each rank has
        filled a part of its own."""
        slots = self._begin()
        self._publish(slots, own)
        self._wait_for(range(self._size))
        return slots if whole_slots else _rows(slots, own)

    def _begin(self) -> torch.Tensor:
        """The slots of the next call, [n, bytes], when nobody reads what was there."""
        self._wait_for(range(self._size))
        self._call += 1
        return self._slots[self._call % 2]

    def _publish(self, slots: torch.Tensor, own: torch.Tensor) -> None:
        slots[self._rank, : own.nbytes].view(own.dtype).copy_(own)
        self._counters[self._rank * LINE_BYTES // WORD_BYTES] = self._call

    def _wait_for(self, ranks: Sequence[int]) -> None:
        """Until they have come to this call, too."""
        for rank in ranks:
            place = rank * LINE_BYTES // WORD_BYTES
            if self._counters[place] < self._call:
                self._wait_at(place, rank)

    def _wait_at(self, place: int, rank: int) -> None:
        for _ in range(NUM_SPINS):
            # Lets go of the interpreter, too.
            os.sched_yield()
            if self._counters[place] >= self._call:
                return
        began = time.monotonic()
        while self._counters[place] < self._call:
            waited = time.monotonic() - began
            if waited > self._timeout_s:
                raise TimeoutError(f"rank {rank} of the axis has not come to a collective within {self._timeout_s:g} s")
            time.sleep(min(max(waited * SLEEP_PART, MIN_SLEEP_S), MAX_SLEEP_S))


def memory_bytes(size: int) -> int:
    """Of an axis of so many ranks."""
    return size * (LINE_BYTES + 2 * SLOT_BYTES)


def _map(path: str, num_bytes: int) -> mmap.mmap | None:
    """None: it cannot be had here."""
    if platform.machine() not in ORDERED_MACHINES:
        return None
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        return mmap.mmap(descriptor, num_bytes)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _parts(flat: torch.Tensor, max_bytes: int) -> Iterator[slice]:
    """Of so many bytes each, as long as there are numbers."""
    step = max_bytes // flat.itemsize
    return (slice(first, min(first + step, len(flat))) for first in range(0, len(flat), step))


def _rows(slots: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Each slot's beginning as numbers, [n, size]."""
    return slots[:, : like.nbytes].view(like.dtype)


def _add(terms: torch.Tensor, out: torch.Tensor) -> None:
    """[n, size] -> [size], see `sum_of_terms`."""
    if len(terms) == 2:
        # Also of 16 bits with one rounding.
        torch.add(terms[0], terms[1], out=out)
        return
    is_narrow = out.is_floating_point() and out.itemsize < torch.float32.itemsize
    out.copy_(sum_of_terms(terms.float() if is_narrow else terms))
