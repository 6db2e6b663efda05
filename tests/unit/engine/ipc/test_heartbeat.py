"""A stopped process is told from a slow one, from one that has ended, and from another one with its number."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from waybill.engine.config import EngineConfig
from waybill.engine.ipc.heartbeat import Heartbeat, StandstillWatch, open_process
from waybill.engine.ipc.heartbeat_table import HeartbeatTable, Member, start_time

WAIT_S = 60.0
TIMEOUT_S = 4.0
MEMBER = """
import sys
from waybill.engine.ipc.heartbeat import Heartbeat
from waybill.engine.ipc.heartbeat_table import HeartbeatTable
heart = Heartbeat(HeartbeatTable.attach(sys.argv[1]), sys.argv[2], float(sys.argv[3]), is_rank=True)
print("beats", flush=True)
if sys.stdin.readline() == "leave\\n":
    heart.leave()
"""


def test_what_stands_still_is_told_after_so_many_ticks_and_no_earlier() -> None:
    watch = StandstillWatch(3)
    assert watch.tick({1: 5, 2: 5}) == []
    assert watch.tick({1: 5, 2: 6}) == [] == watch.tick({1: 5, 2: 7})
    assert watch.tick({1: 5, 2: 8}) == [1]


def test_one_beat_begins_the_count_anew_and_who_is_gone_is_forgotten() -> None:
    watch = StandstillWatch(2)
    for beats in (0, 0, 1, 1, 2, 2):
        assert watch.tick({1: beats}) == []
    assert watch.tick({}) == []
    assert watch.tick({1: 2}) == [] == watch.tick({1: 2}), "its slot is looked at for the first time again"
    assert watch.tick({1: 2}) == [1]


def test_a_watcher_that_was_itself_asleep_counts_its_own_ticks() -> None:
    """All stood still together, as in a machine that was suspended: however long it was, it is one tick."""
    watch = StandstillWatch(2)
    watch.tick({1: 7})
    assert watch.tick({1: 7}) == []
    assert watch.tick({1: 8}) == []


@pytest.mark.parametrize("seconds", [0.0, 1.9, -1.0, float("nan"), float("inf"), 1e7])
def test_the_bound_has_a_range(seconds: float) -> None:
    with pytest.raises(ValueError, match=r"heartbeat_timeout_s=.*: must lie in 2 \.\. 1e6"):
        EngineConfig(model_path="m", heartbeat_timeout_s=seconds)


@pytest.fixture
def table() -> Iterator[HeartbeatTable]:
    table = HeartbeatTable.create()
    yield table
    table.close()


@pytest.fixture
def start(table: HeartbeatTable) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    children: list[subprocess.Popen[str]] = []

    def start(name: str, timeout_s: float = 1000.0) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", MEMBER, table.path, name, str(timeout_s)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        children.append(child)
        assert child.stdout is not None and child.stdout.readline() == "beats\n"
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate()


def test_a_stopped_process_is_killed_by_any_other_and_its_neighbours_are_not(
    table: HeartbeatTable, start: Callable[..., subprocess.Popen[str]]
) -> None:
    victim, watcher = start("rank 0"), start("rank 1", TIMEOUT_S)
    assert [(m.name, m.pid, m.is_rank) for m in table.members()] == [
        ("rank 0", victim.pid, True),
        ("rank 1", watcher.pid, True),
    ]
    victim.send_signal(signal.SIGSTOP)
    assert victim.wait(WAIT_S) == -signal.SIGKILL
    assert watcher.poll() is None


def test_a_stop_that_is_shorter_than_the_bound_is_nothing(
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    victim = start("rank 0")
    start("rank 1", 20.0)
    victim.send_signal(signal.SIGSTOP)
    time.sleep(3.0)
    victim.send_signal(signal.SIGCONT)
    with pytest.raises(subprocess.TimeoutExpired):
        victim.wait(3.0)


def test_who_only_watches_has_no_slot_and_can_not_be_killed(
    table: HeartbeatTable, start: Callable[..., subprocess.Popen[str]]
) -> None:
    """As a calling program, which may be stopped at a terminal for as long as its user likes."""
    victim = start("rank 0")
    eye = Heartbeat(table, None, TIMEOUT_S)
    assert [member.name for member in table.members()] == ["rank 0"]
    victim.send_signal(signal.SIGSTOP)
    assert victim.wait(WAIT_S) == -signal.SIGKILL
    eye.stop_watching()


def test_a_rank_that_ends_without_leaving_is_told_and_one_that_leaves_is_not(
    table: HeartbeatTable, start: Callable[..., subprocess.Popen[str]]
) -> None:
    lost: list[str] = []
    leaving, dying = start("leaves"), start("dies")
    eye = Heartbeat(table, None, TIMEOUT_S, on_lost=lost.append)
    leaving.communicate("leave\n")
    dying.kill()
    deadline = time.monotonic() + WAIT_S
    while not lost:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    assert lost == ["dies"], "once"
    eye.stop_watching()


def test_a_number_that_is_another_process_by_now_is_not_it(start: Callable[..., subprocess.Popen[str]]) -> None:
    child = start("rank 0")
    started = start_time(child.pid)
    assert started is not None
    member = Member(0, "rank 0", child.pid, started, 0, True, False)
    process = open_process(member)
    assert process is not None
    later = Member(0, "rank 0", child.pid, started - 1, 0, True, False)
    assert open_process(later) is None
    child.kill()
    assert select.select([process], [], [], WAIT_S)[0]
    os.close(process)
    child.wait(WAIT_S)
    assert open_process(member) is None and start_time(child.pid) is None
