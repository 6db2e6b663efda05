"""An agent that is told to end before torchrun's own handlers are in place."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from waybill.launch import agent as agent_module

START_S = 120.0
END_S = 30.0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_its_folder_goes_with_it(tmp_path: Path, number: int) -> None:
    """It waits inside torch, where no handler of Python's runs."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    nodes = ["--nnodes", "2", "--node-rank", "0", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    agent = subprocess.Popen(
        [sys.executable, "-m", "waybill.launch.command_line", "serve", *nodes],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + START_S
    while not is_listening(port):
        assert time.monotonic() < deadline and agent.poll() is None
        time.sleep(0.05)
    assert len(os.listdir(tmp_path)) == 1
    agent.send_signal(number)
    assert agent.wait(END_S) == 128 + number
    assert os.listdir(tmp_path) == []


LATE_WATCHER = """
import os, signal, sys, time
from waybill.launch import agent

agent.start_critical_thread = lambda watch, name: None
with agent.holding_signals():
    if sys.argv[2] == "before":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
    print("held", flush=True)
    agent.watch_signals(sys.argv[1])
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(0.1)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("lost")
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_signal_is_not_lost_where_the_thread_comes_after_torchruns_handlers(tmp_path: Path, when: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    agent = subprocess.run(
        [sys.executable, "-c", LATE_WATCHER, str(folder), when],
        stdout=subprocess.PIPE,
        text=True,
        timeout=START_S,
        check=False,
    )
    assert (agent.stdout, agent.returncode) == ("held\n", 128 + signal.SIGTERM)
    assert not folder.exists()


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


LEAVES_A_FILE = "import tempfile; print(tempfile.mkdtemp()); open(tempfile.mkstemp()[1], 'w').write('left')"


def test_what_a_rank_leaves_in_the_temporary_folder_goes_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler that was killed removes nothing."""
    folders: list[Path] = []

    def ranks(arguments: list[str]) -> None:
        done = subprocess.run([sys.executable, "-c", LEAVES_A_FILE], capture_output=True, text=True, check=True)
        folders.append(Path(done.stdout.strip()))
        assert folders[0].is_dir()

    for name in ("start_heartbeat", "register"):
        monkeypatch.setattr(agent_module, name, lambda: None)
    monkeypatch.setattr(agent_module, "torchrun", ranks)
    monkeypatch.setattr(agent_module.signal, "signal", lambda number, handler: None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    assert agent_module.run_agent(str(run_dir), []) == 0
    assert run_dir in folders[0].parents and os.listdir(tmp_path) == []
