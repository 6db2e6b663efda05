"""The output processor beside many dp ranks: how far it is behind, and the CPU time that it takes; one, and one per node.

    python bench/gpu_processors.py --dp 8                                            eight GPUs
    python bench/gpu_processors.py --dp 4 --device cpu --shape toy30b --requests 8   a dry run

`--output-processors node` is one for each node, so on one host the node is cut in two: two agents on two loopback
addresses, each with half of the devices, as two hosts would be; the collectives between them go through NCCL or gloo, not
through symmetric memory. That setting is measured with one output processor and with one per node, and beside it the
undivided host. Requests come over HTTP, all at once, and have all their rows by reference.

The lag is that of filing: ring slots that are taken, seen while the requests run, times the mean step.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from make_models import write_config
from marked_results import kill_all, say
from model_shapes import SHAPES

from waybill.launch.open_files import raise_limit

ROOT = Path(__file__).resolve().parents[1]
READY = "waybill is ready: "
ADDRESSES = ("127.0.0.1", "127.0.0.2")
# By name: nodes, and which output processors.
SETTINGS = {
    "one host, one": (1, "engine"),
    "two nodes, one": (2, "engine"),
    "two nodes, one each": (2, "node"),
}
VISIBLE = "CUDA_VISIBLE_DEVICES"
# Beside a connection a request.
OTHER_FILES = 256
PROMPT_TOKENS = 64
SAMPLE_S = 0.1
LEAVE_S = 60.0
MILLI = 1e3


def node_options(node: int, num_nodes: int, port: int) -> list[str]:
    if num_nodes == 1:
        return []
    options = ["--nnodes", str(num_nodes), "--node-rank", str(node), "--node-address", ADDRESSES[node]]
    return [*options, "--rdzv-endpoint", f"{ADDRESSES[0]}:{port}"]


def devices_of(node: int, num_nodes: int, num_ranks: int, visible: str | None = None) -> str:
    """What `CUDA_VISIBLE_DEVICES` names for a node: its part of those that it names now, if it does."""
    here = num_ranks // num_nodes
    devices = visible.split(",") if visible else list(map(str, range(num_ranks)))
    return ",".join(devices[node * here : (node + 1) * here])


def free_port() -> int:
    with socket.create_server((ADDRESSES[0], 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def serve(num_nodes: int, options: list[str], num_ranks: int) -> Iterator[tuple[str, list[int]]]:
    """A server on one node or on two of this host; its URL, and its agents."""
    port, agents, visible = free_port(), [], os.environ.get(VISIBLE)
    try:
        for node in range(num_nodes):
            command = [
                str(ROOT / "torchrun.sh"),
                "serve",
                "--port",
                "0",
                *node_options(node, num_nodes, port),
                *options,
            ]
            environment = os.environ | {VISIBLE: devices_of(node, num_nodes, num_ranks, visible)}
            agents.append(subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                env=environment,
            ))  # fmt: skip
        for agent in agents[1:]:
            threading.Thread(target=drain, args=(agent,), daemon=True).start()
        url = wait_for_url(agents[0])
        threading.Thread(target=drain, args=(agents[0],), daemon=True).start()
        yield url, [agent.pid for agent in agents]
        agents[0].terminate()
        for agent in agents:
            agent.wait(LEAVE_S)
    finally:
        for agent in agents:
            if agent.poll() is None:
                kill_all(agent.pid)
            agent.wait()


def wait_for_url(agent: subprocess.Popen[str]) -> str:
    assert agent.stdout is not None
    for line in agent.stdout:
        if line.startswith(READY):
            return line.removeprefix(READY).strip()
        print(line, end="", flush=True)
    raise RuntimeError("the server did not start")


def drain(agent: subprocess.Popen[str]) -> None:
    assert agent.stdout is not None
    for _ in agent.stdout:
        pass


def processors_of(agents: list[int]) -> list[psutil.Process]:
    return [
        child
        for agent in agents
        for child in psutil.Process(agent).children(recursive=True)
        if "waybill.engine.output.output_processor" in child.cmdline()
    ]


async def load(url: str, num_requests: int, num_tokens: int) -> list[list[int]]:
    """All requests to their ends; taken ring slots of all recorders, by sample."""
    samples: list[list[int]] = []
    limits = httpx.Limits(max_connections=num_requests + 1)
    async with httpx.AsyncClient(base_url=url, timeout=600.0, limits=limits) as client:

        async def ask(number: int) -> None:
            ids = [1 + (number * 31 + at * 7) % 200 for at in range(PROMPT_TOKENS)]
            body = {
                "input_ids": ids,
                "sampling_params": {"max_new_tokens": num_tokens, "ignore_eos": True, "temperature": 0.0},
                "return_routed_experts": True,
                "routed_experts_format": "compact",
                "routed_experts_delivery": "reference",
            }
            reply = await client.post("/generate", json=body)
            reply.raise_for_status()
            error = reply.json()["meta_info"].get("routed_experts_error")
            assert error is None, error

        async def sample() -> None:
            while True:
                samples.append([rank["routing_ring_occupied"] for rank in await dp_states(client)])
                await asyncio.sleep(SAMPLE_S)

        sampling = asyncio.create_task(sample())
        await asyncio.gather(*map(ask, range(num_requests)))
        sampling.cancel()
        await asyncio.gather(sampling, return_exceptions=True)
    return samples


async def dp_states(client: httpx.AsyncClient) -> list[dict[str, Any]]:
    reply = await client.get("/server_info")
    reply.raise_for_status()
    return list(reply.json()["dp_ranks"])


def counters(url: str) -> dict[str, int]:
    with httpx.Client(base_url=url, timeout=60.0) as client:
        ranks = client.get("/server_info").json()["dp_ranks"]
    return {key: sum(rank[key] for rank in ranks) for key in ("num_steps", "routing_ring_waits")}


def measure(url: str, agents: list[int], options: argparse.Namespace) -> dict[str, Any]:
    """One load after another that warms up."""
    asyncio.run(load(url, options.requests, 8))
    processors, before = processors_of(agents), counters(url)
    cpu_s, began = [total_cpu_s(each) for each in processors], time.monotonic()
    samples = asyncio.run(load(url, options.requests, options.tokens))
    wall_s, after = time.monotonic() - began, counters(url)
    num_steps = (after["num_steps"] - before["num_steps"]) / options.dp
    # Of the recorder that is furthest behind.
    taken = np.array(samples).max(axis=1)
    return {
        "processors": len(processors),
        "tokens_per_s": options.requests * options.tokens / wall_s,
        "step_ms": MILLI * wall_s / num_steps,
        "lag_steps": float(taken.mean()),
        "lag_steps_max": int(taken.max()),
        "ring_waits": after["routing_ring_waits"] - before["routing_ring_waits"],
        "cpu_shares": [(total_cpu_s(each) - of) / wall_s for each, of in zip(processors, cpu_s, strict=True)],
    }


def total_cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dp", type=int, required=True, help="dp ranks, an even number")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="30b", help="of make_models.py")
    parser.add_argument("--requests", type=int, default=1024, help="in all, at once")
    parser.add_argument("--tokens", type=int, default=256, help="new tokens of each")
    options = parser.parse_args()
    if options.dp < 2 or options.dp % 2:
        parser.error(f"--dp {options.dp}: must be even, for two nodes")
    raise_limit(options.requests + OTHER_FILES)
    running = -(-options.requests // options.dp)
    with tempfile.TemporaryDirectory(prefix="waybill-") as model:
        write_config(options.shape, Path(model))
        flags = [
            "--model",
            model,
            "--load-format",
            "dummy",
            "--enable-return-routed-experts",
            "--device",
            options.device,
        ]
        flags += ["--dp", str(options.dp), "--tp", "1", "--max-running-requests", str(running)]
        flags += ["--kv-cache-tokens", str(running * (PROMPT_TOKENS + options.tokens + 1))]
        flags += ["--num-threads", "1"] if options.device == "cpu" else []
        for name, (num_nodes, processors) in SETTINGS.items():
            with serve(num_nodes, [*flags, "--output-processors", processors], options.dp) as (url, agents):
                say("processors", setting=name, dp=options.dp, requests=options.requests,
                    **measure(url, agents, options))  # fmt: skip
    say("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
