"""Whatever dies or is stopped while requests run: every caller gets an error soon, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
import torch
import zmq
from support.gpu_memory import free_bytes, wait_until_free
from support.process_tree import DEADLINE_S, children_of, find, is_alive, process_of, ranks_of, wait_until_gone
from support.server_process import ServerProcess

from waybill import Engine, EngineDeadError

# A process that was stopped is noticed after so long, and all have ended some seconds later.
HEARTBEAT_S = 4.0
STOPPED_DEADLINE_S = 40.0
ENDLESS = {"max_new_tokens": 4000, "ignore_eos": True}
pytestmark = pytest.mark.usefixtures("temporary")


@pytest.mark.parametrize(
    ("victim", "dp_size", "how"),
    [
        ("rank 0", 1, signal.SIGKILL),
        ("rank 1", 2, signal.SIGKILL),
        # Those of a server are stopped below.
        *(
            pytest.param(victim, dp_size, signal.SIGSTOP, marks=pytest.mark.matrix)
            for victim, dp_size in (("rank 1", 1), ("output processor", 1), ("agent", 1), ("rank 0", 2))
        ),
    ],
)
def test_a_process_of_the_engine_is_killed_or_stopped(
    checkpoint: str, victim: str, dp_size: int, how: signal.Signals
) -> None:
    """Two ranks, tensor-parallel or data-parallel; also a rank that only waits for the others' requests."""
    check_a_death(checkpoint, victim, dp_size, how)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("victim", "dp_size", "how"),
    [
        ("rank 1", 1, signal.SIGKILL),
        ("rank 1", 2, signal.SIGKILL),
        ("rank 0", 1, signal.SIGKILL),
        ("rank 1", 1, signal.SIGSTOP),
    ],
)
def test_a_rank_on_a_gpu_is_killed_or_stopped(checkpoint: str, victim: str, dp_size: int, how: signal.Signals) -> None:
    """Inside graphs with collectives, where the other GPU waits for one that does not come any more."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 CUDA devices")
    before = free_bytes()
    check_a_death(checkpoint, victim, dp_size, how, device="cuda", num_read=20)
    wait_until_free(before, DEADLINE_S)


def check_a_death(
    checkpoint: str, victim: str, dp_size: int, how: signal.Signals, *, device: str = "cpu", num_read: int = 1
) -> None:
    """While requests run of which each has so many tokens."""
    # A server that other tests share, say.
    others = set(children_of(os.getpid()))
    engine = Engine(
        checkpoint,
        tp_size=2 // dp_size,
        dp_size=dp_size,
        device=device,
        enable_return_routed_experts=True,
        kv_cache_tokens=16384,
        heartbeat_timeout_s=HEARTBEAT_S,
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
            for _ in range(num_read):
                next(stream)
        began = time.monotonic()
        process_of(processes, victim).send_signal(how)
        for stream in streams:
            with pytest.raises(EngineDeadError):
                for _ in stream:
                    pass
        assert time.monotonic() - began < (DEADLINE_S if how == signal.SIGKILL else STOPPED_DEADLINE_S)
        with pytest.raises(EngineDeadError):
            engine.generate(input_ids=[1, 2, 3])
    finally:
        engine.shutdown()
    wait_until_gone(run_dir, [process.pid for process in processes])


@pytest.mark.parametrize("victim", ["rank 1", "frontend"])
def test_a_stopped_process_ends_a_server_and_a_pause_does_not(checkpoint: str, victim: str) -> None:
    """The ranks of a server ignore SIGTERM, so that its agent would wait half a minute for them."""
    server = ServerProcess("--model", checkpoint, "--kv-cache-tokens", "8192", "--heartbeat-timeout", str(HEARTBEAT_S))
    processes = [*server.descendants(), psutil.Process(server.process.pid)]
    folders = {word for p in processes for word in p.cmdline() if Path(word).name.startswith("waybill-")}
    assert len(folders) == 1
    try:
        with httpx.Client(base_url=server.url, timeout=60.0) as client:
            if victim == "frontend":
                # Neither rest, nor a pause of generation, nor a stop within the bound, is the end of anybody.
                assert client.post("/pause_generation", json={"mode": "in_place"}).status_code == 200
                time.sleep(1.5 * HEARTBEAT_S)
                ranks_of(processes)[0].suspend()
                time.sleep(HEARTBEAT_S / 4)
                ranks_of(processes)[0].resume()
                assert client.post("/continue_generation").status_code == 200
            body = {"input_ids": [1] * 20, "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
            assert client.post("/generate", json=body).json()["meta_info"]["completion_tokens"] == 4
            state = client.get("/get_server_info").json()
            assert state["heartbeat_timeout_s"] == HEARTBEAT_S and 0 < state["max_step_s"] < 60
            target = find(processes, "waybill.launch.frontend") if victim == "frontend" else ranks_of(processes)[1]
            began = time.monotonic()
            target.suspend()
            with pytest.raises(httpx.TransportError):
                client.post("/generate", json={**body, "sampling_params": ENDLESS})
        # Waited for first: whoever asks for it later gets no status.
        assert server.process.wait(STOPPED_DEADLINE_S) != 0
        _, alive = psutil.wait_procs(processes, timeout=DEADLINE_S)
        assert not alive, f"left behind: {alive}"
        assert time.monotonic() - began < STOPPED_DEADLINE_S
        assert not any(Path(folder).exists() for folder in folders)
    finally:
        for process in processes:
            if is_alive(process.pid):
                process.kill()


def test_a_frontend_that_cannot_read_what_comes_back_ends_the_engine(checkpoint: str) -> None:
    """Its task fails; callers hear of it, and nothing of the engine waits for a shutdown that may never come."""
    others = set(children_of(os.getpid()))
    engine = Engine(checkpoint, tp_size=1, kv_cache_tokens=8192)
    try:
        processes = [p for p in set(children_of(os.getpid())) - others if "waybill" in " ".join(p.cmdline())]
        stream = engine.generate(input_ids=[1] * 20, sampling_params=ENDLESS, stream=True)
        next(stream)
        with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
            socket.connect(f"ipc://{engine.run_dir}/frontend")
            socket.send(b"\xc1 no message")
            with pytest.raises(EngineDeadError, match="a malformed message of 12 bytes"):
                for _ in stream:
                    pass
        wait_until_gone(engine.run_dir, [process.pid for process in processes])
        with pytest.raises(EngineDeadError, match="a malformed message"):
            engine.generate(input_ids=[1])
    finally:
        engine.shutdown()


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


def test_shutdown_leaves_nothing(checkpoint: str) -> None:
    others = set(children_of(os.getpid()))
    with Engine(checkpoint, tp_size=1, kv_cache_tokens=1024) as engine:
        run_dir = engine.run_dir
        pids = [process.pid for process in set(children_of(os.getpid())) - others]
    wait_until_gone(run_dir, pids)
    engine.shutdown()
    with pytest.raises(EngineDeadError):
        engine.generate(input_ids=[1])
