"""Runs that fail to start, are ended while they start, or end as they should: why is said, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from support.process_tree import DEADLINE_S, children_of, find, is_alive, process_of, processes_of_run, ranks_of
from support.server_process import ROOT, ServerProcess

from waybill import Engine
from waybill.launch.run_dir import EXIT_USAGE, RunDir

START_S = 120.0
pytestmark = pytest.mark.usefixtures("temporary")


def test_a_failed_start_says_why(checkpoint: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model_path=.*config\.json"):
        Engine(str(tmp_path))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((Path(checkpoint) / "config.json").read_text())
    with pytest.raises(ValueError, match=r"must hold model\.safetensors"):
        Engine(str(broken), tp_size=1)


SMALL = ("--tp", "1", "--kv-cache-tokens", "8192")


def start_server() -> subprocess.Popen[bytes]:
    command = [str(ROOT / "torchrun.sh"), "serve", "--port", "0", *SMALL]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def run_dir_of(temporary: Path, *names: str) -> Path:
    """The folder of a run that is starting, when it holds all of `names`."""
    deadline = time.monotonic() + START_S
    while True:
        for folder in temporary.iterdir():
            if all((folder / name).exists() for name in names):
                return folder
        assert time.monotonic() < deadline
        time.sleep(0.01)


def all_gone(processes: list[psutil.Process]) -> bool:
    psutil.wait_procs(processes, timeout=DEADLINE_S)
    return not any(is_alive(process.pid) for process in processes)


@pytest.mark.parametrize(
    ("number", "stage"),
    [
        (signal.SIGTERM, []),
        (signal.SIGINT, ["agent.alive"]),
        # Ranks that have not looked yet whether they have an agent, and ranks that are meeting.
        (signal.SIGKILL, ["torchrun"]),
        (signal.SIGKILL, ["store"]),
    ],
)
def test_the_agent_of_a_server_that_is_starting_is_told_to_end_or_killed(
    temporary: Path, number: int, stage: list[str]
) -> None:
    server = start_server()
    run_dir_of(temporary, *stage)
    deadline = time.monotonic() + START_S
    while number == signal.SIGKILL and not children_of(server.pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    processes = [psutil.Process(server.pid), *children_of(server.pid)]
    server.send_signal(number)
    assert server.wait(START_S) != 0
    assert all_gone(processes)


def test_the_frontend_of_a_server_is_killed(temporary: Path) -> None:
    server = start_server()
    run_dir_of(temporary, "serve.json")
    deadline = time.monotonic() + START_S
    while not any("waybill.launch.frontend" in process.cmdline() for process in children_of(server.pid)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    processes = children_of(server.pid)
    find(processes, "waybill.launch.frontend").kill()
    assert server.wait(START_S) != 0
    assert all_gone(processes)


def test_a_server_whose_port_is_taken_names_it_and_leaves_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        command = [str(ROOT / "torchrun.sh"), "serve", *SMALL, "--port", str(port)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=START_S)
    assert ended.returncode != 0
    assert f"--port {port}: Address already in use" in ended.stderr


def test_the_next_run_removes_what_nobody_could(checkpoint: str, temporary: Path, tmp_path: Path) -> None:
    """Everything is killed at once."""
    server = start_server()
    stale = run_dir_of(temporary, "store")
    # Ranks start processes of their own meanwhile: none may be left out, since it would clean up.
    processes: list[psutil.Process] = []
    while new := [p for p in (psutil.Process(server.pid), *children_of(server.pid)) if p not in processes]:
        for process in new:
            process.suspend()
        processes += new
    for process in processes:
        process.kill()
    assert all_gone(processes)
    server.wait()
    assert stale.exists()
    with pytest.raises(ValueError, match=r"config\.json"):
        Engine(str(tmp_path))
    assert stale.exists(), "what is refused at once starts nothing"
    RunDir().remove()
    assert not stale.exists()


def test_bad_options_are_refused_at_once(checkpoint: str) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"tp_size": 0}, "tp_size=0"),
        ({"dtype": "int4"}, "dtype='int4'"),
        ({"overlap_depth": 2}, "overlap_depth=2"),
        ({"dp_size": 0}, "dp_size=0"),
    ]
    for options, words in bad:
        with pytest.raises(ValueError, match=words):
            Engine(checkpoint, **options)
    with pytest.raises(TypeError):
        Engine(checkpoint, no_such_option=1)


@pytest.fixture
def all_cores() -> Iterator[list[int]]:
    """Those of this machine, whichever this test's process was given."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    yield sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, before)


def cores_of(process: psutil.Process) -> set[frozenset[int]]:
    """Of all its threads."""
    return {frozenset(os.sched_getaffinity(thread.id)) for thread in process.threads()}


def test_ranks_keep_to_their_cores_and_the_caller_stays_where_it_is(checkpoint: str, all_cores: list[int]) -> None:
    if len(all_cores) < 2:
        pytest.skip("two ranks on cores of their own need two")
    first, second, *rest = all_cores
    with Engine(checkpoint, tp_size=2, kv_cache_tokens=8192, cpu_threads_bind=f"{first}|{second}") as engine:
        # Whatever runs has been started once.
        engine.generate("start with 12", {"max_new_tokens": 4})
        processes = processes_of_run(str(engine.run_dir))
        ranks = ranks_of(processes)
        assert {rank: cores_of(process) for rank, process in ranks.items()} == {
            0: {frozenset({first})},
            1: {frozenset({second})},
        }
        # With no core left they have all.
        others = {frozenset(rest or all_cores)}
        assert [cores_of(process_of(processes, name)) for name in ("agent", "output processor")] == [others, others]
        assert os.sched_getaffinity(0) == set(all_cores)


def test_a_server_and_its_rank_share_no_core(all_cores: list[int]) -> None:
    first, *rest = all_cores
    server = ServerProcess(*SMALL, "--cpu-threads-bind", str(first))
    try:
        # Whatever runs has been started once.
        body = {"text": "start with 12", "sampling_params": {"max_new_tokens": 4}}
        httpx.post(f"{server.url}/generate", json=body, timeout=START_S).raise_for_status()
        (rank,) = ranks_of(server.descendants()).values()
        assert cores_of(rank) == {frozenset({first})}
        others = [p for p in [psutil.Process(server.process.pid), *server.descendants()] if p != rank]
        assert len(others) == 3, "agent, output processor and frontend"
        assert [cores_of(process) for process in others] == [{frozenset(rest or all_cores)}] * 3
    finally:
        server.stop()


def test_cores_that_ranks_cannot_have_are_named(checkpoint: str) -> None:
    words = "cpu_threads_bind='0': must have 2 groups"
    with pytest.raises(ValueError, match=words):
        Engine(checkpoint, tp_size=2, cpu_threads_bind="0")
    command = [str(ROOT / "torchrun.sh"), "serve", "--tp", "2", "--cpu-threads-bind", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=START_S)
    assert ended.returncode == EXIT_USAGE and f"torchrun.sh: error: {words}" in ended.stderr
