"""Shared memory in which the processes of a run on one node count their beats.

The memory is a memfd: whoever is there first - the calling program, or torchrun's agent - makes it and tells the others its
path by an environment variable; it has no name, and is gone with the last process that maps it. A slot is claimed by a
lock on its first byte, which the kernel gives back when the process ends.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

NUM_SLOTS = 256
NAME_BYTES = 24
SLOT = np.dtype(
    [
        ("pid", "<i8"),
        ("started", "<i8"),
        ("beats", "<i8"),
        ("is_rank", "<i8"),
        ("has_left", "<i8"),
        ("name", f"S{NAME_BYTES}"),
    ]
)
# Says where the table is; set by the process that starts the others.
PATH_VARIABLE = "WAYBILL_HEARTBEATS"


@dataclass(frozen=True)
class Member:
    """A process that beats. With its time of start a process id names one process and no later one."""

    index: int
    name: str
    pid: int
    started: int
    beats: int
    # Whose end is the end of the run, unless it has left in order.
    is_rank: bool
    has_left: bool


class HeartbeatTable:
    """Made by `create` or `attach`; at most one of them in a process that claims a slot: its locks go with any other."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._slots = np.frombuffer(mmap.mmap(fd, NUM_SLOTS * SLOT.itemsize), dtype=SLOT)

    @staticmethod
    def create() -> HeartbeatTable:
        fd = os.memfd_create("waybill-heartbeats")
        os.ftruncate(fd, NUM_SLOTS * SLOT.itemsize)
        return HeartbeatTable(fd)

    @staticmethod
    def attach(path: str) -> HeartbeatTable:
        return HeartbeatTable(os.open(path, os.O_RDWR | os.O_CLOEXEC))

    @property
    def path(self) -> str:
        """How other processes of this user on this node open the table, while this one lives."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def close(self) -> None:
        """Nobody can attach any more; those who have, and the creator's own view, stay."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def claim(self, name: str, *, is_rank: bool) -> int:
        """A slot for this process, to `beat` in.

        Raises:
            RuntimeError: all are taken.
        """
        for index in range(NUM_SLOTS):
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, index * SLOT.itemsize)
            except OSError:
                continue
            slot = self._slots[index]
            if slot["pid"]:
                # Of a process that has ended: it stays, for those who have not seen that yet.
                fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, index * SLOT.itemsize)
                continue
            started = start_time(os.getpid())
            assert started is not None
            slot["name"], slot["is_rank"], slot["started"] = name.encode()[:NAME_BYTES], is_rank, started
            # Last: a slot without it is not looked at.
            slot["pid"] = os.getpid()
            return index
        raise RuntimeError(f"heartbeats: {NUM_SLOTS} processes of this run beat already")

    def beat(self, index: int) -> None:
        self._slots["beats"][index] += 1

    def leave(self, index: int) -> None:
        """What ends from now on ends in order."""
        self._slots["has_left"][index] = 1

    def members(self) -> Iterator[Member]:
        """Everybody who has claimed a slot, also those who have ended since."""
        for index in np.flatnonzero(self._slots["pid"]).tolist():
            slot = self._slots[index]
            yield Member(
                index,
                bytes(slot["name"]).decode(errors="replace"),
                int(slot["pid"]),
                int(slot["started"]),
                int(slot["beats"]),
                bool(slot["is_rank"]),
                bool(slot["has_left"]),
            )


def start_time(pid: int) -> int | None:
    """When a process was started, in ticks since the machine was; None if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command's name, in brackets, may hold anything; the time is the 20th field behind it.
    return int(stat.rpartition(b")")[2].split()[19])
