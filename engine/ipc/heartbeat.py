"""A process that is stopped (SIGSTOP, a frozen cgroup, a debugger) holds its sockets and answers nobody: noticed here.

Every process of a run beats in its node's `HeartbeatTable`, from a thread, so that a step may take as long as it likes; and
every one watches the others. One that has not beaten for the time-out is killed, and what follows is what follows any
death: the run ends and callers get an error. Time is counted in ticks of the watcher: while a whole machine sleeps nobody
counts. What a beat does not say is that the work goes on; a collective that never ends is bounded by its own time-out.

A calling program watches and does not beat: a user may stop it for as long as he likes.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import time
from collections.abc import Callable, Mapping

from .critical_thread import end_process, start_critical_thread
from .heartbeat_table import PATH_VARIABLE, HeartbeatTable, Member, start_time

logger = logging.getLogger(__name__)

TICKS_PER_TIMEOUT = 20
MAX_TICK_S = 1.0
# Of a process that does not know the time-out.
UNKNOWN_TIMEOUT_S = 5.0
# A rank that ends in order says so first; one that did not is given this many ticks to be reported by whoever started it.
TICKS_TO_BE_REPORTED = 2


class StandstillWatch:
    """Which counters have stood still for `max_ticks` of the watcher's own ticks. Pure."""

    def __init__(self, max_ticks: int) -> None:
        self._max_ticks = max_ticks
        # By key, the last value seen and the ticks since it changed.
        self._seen: dict[int, tuple[int, int]] = {}

    def tick(self, counters: Mapping[int, int]) -> list[int]:
        """The keys of those that stand still; a key that is not given any more is forgotten."""
        seen: dict[int, tuple[int, int]] = {}
        for key, value in counters.items():
            last, ticks = self._seen.get(key, (value, -1))
            seen[key] = (value, ticks + 1 if value == last else 0)
        self._seen = seen
        return [key for key, (_, ticks) in seen.items() if ticks >= self._max_ticks]


class Heartbeat:
    """This process' beat and its eye on the others of its node.

    Args:
        name: what the log calls this process; None for one that only watches.
        timeout_s: after which others are killed; None for a process that only beats.
        is_rank: whether this process' end, unless `leave` was called, is that of the run.
        on_lost: called with the name of a rank that ended without leaving.
        on_failure: see `start_critical_thread`.
    """

    def __init__(
        self,
        table: HeartbeatTable,
        name: str | None,
        timeout_s: float | None,
        *,
        is_rank: bool = False,
        on_lost: Callable[[str], None] | None = None,
        on_failure: Callable[[str], None] = end_process,
    ) -> None:
        self._table = table
        self._own = None if name is None else table.claim(name, is_rank=is_rank)
        self._timeout_s = timeout_s
        self._tick_s = min(MAX_TICK_S, (timeout_s or UNKNOWN_TIMEOUT_S) / TICKS_PER_TIMEOUT)
        self._watch = StandstillWatch(int((timeout_s or 0.0) / self._tick_s))
        self._on_lost = on_lost
        self._processes: dict[int, int | None] = {}
        self._ticks_since_end: dict[int, int] = {}
        self._killed: set[int] = set()
        self._is_over = False
        start_critical_thread(self._run, "heartbeat", on_failure)

    def leave(self) -> None:
        """This process is about to end in order."""
        if self._own is not None:
            self._table.leave(self._own)

    def stop_watching(self) -> None:
        """The run ends: what stops now is nobody's concern."""
        self._is_over = True

    def _run(self) -> None:
        last = time.monotonic()
        while not self._is_over:
            if self._own is not None:
                self._table.beat(self._own)
            if self._timeout_s is not None:
                self._look_at_others()
            time.sleep(self._tick_s)
            now = time.monotonic()
            if self._timeout_s is not None and now - last > self._timeout_s / 2:
                logger.warning("this process could not beat for %.1f s (heartbeat_timeout_s)", now - last)
            last = now
        for process in self._processes.values():
            if process is not None:
                os.close(process)

    def _look_at_others(self) -> None:
        running: dict[int, Member] = {}
        for member in self._table.members():
            if member.index == self._own:
                continue
            process = self._process_of(member)
            if process is not None and not has_ended(process):
                running[member.index] = member
            elif member.is_rank and not member.has_left:
                self._count_lost(member)
        for index in self._watch.tick({index: member.beats for index, member in running.items()}):
            self._kill(running[index])

    def _process_of(self, member: Member) -> int | None:
        """A handle of the very process; None if it had ended before it was looked at."""
        if member.index not in self._processes:
            self._processes[member.index] = open_process(member)
        return self._processes[member.index]

    def _count_lost(self, member: Member) -> None:
        ticks = self._ticks_since_end[member.index] = self._ticks_since_end.get(member.index, 0) + 1
        if ticks == TICKS_TO_BE_REPORTED and self._on_lost is not None:
            logger.error("%s (pid %d) has ended before its time", member.name, member.pid)
            self._on_lost(member.name)

    def _kill(self, member: Member) -> None:
        process = self._processes[member.index]
        assert process is not None
        if member.index in self._killed:
            return
        self._killed.add(member.index)
        logger.error(
            "%s (pid %d) has not run for %g s (heartbeat_timeout_s): killing it, which ends the run",
            member.name,
            member.pid,
            self._timeout_s,
        )
        try:
            signal.pidfd_send_signal(process, signal.SIGKILL)
        except ProcessLookupError:
            # Another watcher was faster.
            return


def open_process(member: Member) -> int | None:
    """A pidfd; None if the process has ended, whoever may have its number now."""
    try:
        process = os.pidfd_open(member.pid)
    except ProcessLookupError:
        return None
    if start_time(member.pid) == member.started:
        return process
    os.close(process)
    return None


def has_ended(process: int) -> bool:
    """Also of one that was not waited for yet."""
    poller = select.poll()
    poller.register(process, select.POLLIN)
    return bool(poller.poll(0))


def table_of_this_run() -> HeartbeatTable:
    """The table that whoever started this process made.

    Raises:
        RuntimeError: it was not started by Waybill's launcher.
    """
    path = os.environ.get(PATH_VARIABLE)
    if path is None:
        raise RuntimeError(f"{PATH_VARIABLE} is not set: start the engine with torchrun.sh or waybill.Engine")
    return HeartbeatTable.attach(path)
