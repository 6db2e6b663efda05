"""Whatever dies while requests run: every caller gets an error soon, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from waybill import Engine, EngineDeadError

DEADLINE_S = 10.0
ENDLESS = {"max_new_tokens": 4000, "ignore_eos": True}


def leftovers(run_dir: str) -> list[str]:
    """Processes that mention the run's folder, and the folder itself."""
    found = [run_dir] if Path(run_dir).exists() else []
    for process in psutil.process_iter(["cmdline"]):
        if process.pid != os.getpid() and any(run_dir in part for part in process.info["cmdline"] or []):
            found.append(" ".join(process.info["cmdline"]))
    return found


def wait_until_gone(run_dir: str, pids: list[int]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while leftovers(run_dir) or any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, f"left behind: {leftovers(run_dir)} {[p for p in pids if is_alive(p)]}"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


def children_of(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def find(processes: list[psutil.Process], *words: str) -> psutil.Process:
    """The one whose command line has all `words`."""
    for process in processes:
        line = " ".join(process.cmdline())
        if all(word in line for word in words):
            return process
    raise AssertionError(f"no process has {words}")


def ranks_of(processes: list[psutil.Process]) -> dict[int, psutil.Process]:
    return {
        int(process.environ()["RANK"]): process
        for process in processes
        if "waybill.launch.worker" in process.cmdline() and "RANK" in process.environ()
    }


@pytest.mark.parametrize(
    ("victim", "dp_size"), [("rank 0", 1), ("rank 1", 1), ("output processor", 1), ("rank 0", 2), ("rank 1", 2)]
)
def test_a_process_of_the_engine_is_killed(checkpoint: str, victim: str, dp_size: int) -> None:
    """Two ranks, tensor-parallel or data-parallel; also a rank that only waits for the others' requests."""
    before = shared_memory()
    # A server that other tests share, say.
    others = set(children_of(os.getpid()))
    engine = Engine(
        checkpoint,
        tp_size=2 // dp_size,
        dp_size=dp_size,
        enable_return_routed_experts=True,
        kv_cache_tokens=8192,
    )
    run_dir = engine.run_dir
    try:
        processes = [p for p in set(children_of(os.getpid())) - others if "waybill" in " ".join(p.cmdline())]
        streams = [
            engine.generate(
                input_ids=[i + 1] * 20,
                sampling_params=ENDLESS,
                stream=True,
                return_routed_experts=True,
                routed_dp_rank=0,
            )
            for i in range(3)
        ]
        for stream in streams:
            next(stream)
        target = (
            find(processes, "waybill.engine.output_processor")
            if victim == "output processor"
            else ranks_of(processes)[int(victim[-1])]
        )
        began = time.monotonic()
        os.kill(target.pid, signal.SIGKILL)
        for stream in streams:
            with pytest.raises(EngineDeadError):
                for _ in stream:
                    pass
        assert time.monotonic() - began < DEADLINE_S
        with pytest.raises(EngineDeadError):
            engine.generate(input_ids=[1, 2, 3])
    finally:
        engine.shutdown()
    wait_until_gone(run_dir, [process.pid for process in processes])
    assert shared_memory() <= before


CALLER = """
import sys
from waybill import Engine
if __name__ == "__main__":
    engine = Engine(sys.argv[1], tp_size=2, enable_return_routed_experts=True, kv_cache_tokens=8192)
    stream = engine.generate(input_ids=[1] * 20, sampling_params={"max_new_tokens": 4000, "ignore_eos": True}, stream=True)
    next(stream)
    print(engine.run_dir, flush=True)
    for _ in stream:
        pass
"""


def test_the_caller_is_killed(checkpoint: str, tmp_path: Path) -> None:
    before = shared_memory()
    script = tmp_path / "caller.py"
    script.write_text(CALLER)
    caller = subprocess.Popen([sys.executable, str(script), checkpoint], stdout=subprocess.PIPE, text=True)
    assert caller.stdout is not None
    run_dir = caller.stdout.readline().strip()
    assert Path(run_dir).exists()
    pids = [process.pid for process in children_of(caller.pid)]
    assert len(pids) >= 4, "the agent, two ranks and the output processor"
    caller.kill()
    caller.wait()
    wait_until_gone(run_dir, pids)
    assert shared_memory() <= before


def test_shutdown_leaves_nothing(checkpoint: str) -> None:
    before = shared_memory()
    others = set(children_of(os.getpid()))
    with Engine(checkpoint, tp_size=1, kv_cache_tokens=1024) as engine:
        run_dir = engine.run_dir
        pids = [process.pid for process in set(children_of(os.getpid())) - others]
    wait_until_gone(run_dir, pids)
    engine.shutdown()
    with pytest.raises(EngineDeadError):
        engine.generate(input_ids=[1])
    assert shared_memory() <= before


def test_a_failed_start_says_why(checkpoint: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model_path=.*config\.json"):
        Engine(str(tmp_path))
    with pytest.raises(ValueError, match=r"context_length=100000: must be at most"):
        Engine(checkpoint, tp_size=1, context_length=100_000)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((Path(checkpoint) / "config.json").read_text())
    with pytest.raises(ValueError, match=r"must hold model\.safetensors"):
        Engine(str(broken), tp_size=1)


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
