"""What a finishing request costs the rank's step thread, at 1k, 8k and 32k rows of routing (48 layers, top-8 of 128).

The real leader (scheduler, planner, committer, pages, model runner, ring) runs in this process, with a real output
processor beside it. `finish` is the work that a finish adds to the step thread: prefix-cache insert, page release and
leaving the queues. `commit` is everything between a step's result and its record being on the socket, in a step with a
finish. Beside it, in the same process, the inline algorithm: gather the rows by slot as int32,
serialise, base64.

    python bench/make_models.py routing30b --out /tmp/routing30b
    python bench/finish_cost.py --model /tmp/routing30b
"""

from __future__ import annotations

import argparse
import base64
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import zmq
from machine import describe, write_result
from rich.console import Console
from rich.table import Table

from waybill.engine.config import EngineConfig
from waybill.engine.io_struct import (
    BackendMessage,
    FrontendMessage,
    OutputBatch,
    OutputRecord,
    SamplingParams,
    TokenizedGenerateReqInput,
)
from waybill.engine.lifeline import Lifeline
from waybill.engine.output_processor_config import OutputProcessorConfig
from waybill.engine.replica import build_leader
from waybill.engine.scheduler import Endpoints, Scheduler
from waybill.engine.sockets import Receiver, Sender
from waybill.engine.step_committer import FinishCost
from waybill.parallel.mesh import ParallelMesh

NUM_NEW = 8
LENGTHS = (1024, 8192, 32768)
MICRO = 1e6


@dataclass
class FinishTimes(FinishCost):
    """Keeps every finish instead of their sum."""

    seconds: list[float] = field(default_factory=list)

    def add(self, seconds: float) -> None:
        super().add(seconds)
        self.seconds.append(seconds)


@dataclass
class CommitTimes:
    """Times the commits of steps in which a request finished."""

    scheduler: Scheduler[Any]
    with_finish: list[float] = field(default_factory=list)

    def install(self) -> None:
        commit = self.scheduler.committer.commit
        record = self.scheduler._record

        def timed_commit(planned: Any, result: Any) -> Any:
            self._began = time.perf_counter()
            committed = commit(planned, result)
            self._finished = bool(committed.finished)
            return committed

        def timed_record(*args: Any) -> None:
            record(*args)
            if self._finished:
                self.with_finish.append(time.perf_counter() - self._began)

        self.scheduler.committer.commit = timed_commit  # type: ignore[method-assign]
        self.scheduler._record = timed_record  # type: ignore[method-assign]


class Bench:
    """A leader in this process and an output processor in another."""

    def __init__(self, model_path: str, folder: str) -> None:
        config = EngineConfig(
            model_path=model_path,
            kv_cache_tokens=2 * max(LENGTHS),
            max_running_requests=4,
            enable_return_routed_experts=True,
        )
        self.context = zmq.Context()
        address = {name: f"ipc://{folder}/{name}" for name in ("inbox", "records", "frontend", "queries")}
        self.lifeline = Lifeline(f"{folder}/alive")
        processor = OutputProcessorConfig(
            records_address=address["records"],
            frontend_address=address["frontend"],
            queries_address=address["queries"],
            tokenizer_path=model_path,
            lifeline_path=self.lifeline.path,
            claim_budget_bytes=1 << 20,
            claim_ttl_s=60.0,
        )
        file = Path(folder) / "output_processor.json"
        file.write_bytes(msgspec.json.encode(processor))
        command = [sys.executable, "-m", "waybill.engine.output_processor", "--config", str(file)]
        self.processor = subprocess.Popen(command)
        self.answers: Receiver[BackendMessage] = Receiver(self.context, address["frontend"], BackendMessage)
        inbox: Receiver[FrontendMessage] = Receiver(self.context, address["inbox"], FrontendMessage)
        self.outbox: Sender[FrontendMessage] = Sender(self.context, address["inbox"])
        records: Sender[OutputRecord] = Sender(self.context, address["records"])
        frontend: Sender[BackendMessage] = Sender(self.context, address["frontend"])
        endpoints = Endpoints(inbox, [], records, frontend)
        self.scheduler = build_leader(config, ParallelMesh.single(torch.device("cpu")), endpoints)
        self.num_sent = 0

    def generate(self, prompt: np.ndarray, start_len: int) -> int:
        """Run one request to its answer; returns the rows that arrived."""
        self.num_sent += 1
        self.outbox.send(
            TokenizedGenerateReqInput(
                dispatch=self.num_sent,
                rid=f"r{self.num_sent}",
                input_ids=prompt.astype("<i4").tobytes(),
                sampling_params=SamplingParams(max_new_tokens=NUM_NEW, temperature=0.0, ignore_eos=True),
                return_routed_experts=True,
                routed_experts_start_len=start_len,
            )
        )
        while self.scheduler.is_idle:
            self.scheduler.receive()
        while not self.scheduler.is_idle:
            self.scheduler.step()
        message, frames = self.answers.receive()
        while not isinstance(message, OutputBatch):
            message, frames = self.answers.receive()
        meta = message.outputs[0].routed_experts
        assert meta is not None and len(frames) == 1
        return meta.rows

    def close(self) -> None:
        self.lifeline.cut()
        self.processor.wait(10)
        self.context.destroy(linger=0)


def inline_costs(num_rows: int, repeats: int) -> dict[str, float]:
    """Seconds of the inline algorithm's parts for a full history, medians."""
    store = np.random.default_rng(0).integers(0, 128, (2 * max(LENGTHS), 48, 8), dtype=np.int32)
    slots = np.random.default_rng(1).permutation(len(store))[:num_rows]
    rows = store[slots]
    raw = pickle.dumps(rows, protocol=5)
    return {
        "gather": median_of(lambda: store[slots], repeats),
        "serialise": median_of(lambda: pickle.dumps(rows, protocol=5), repeats),
        "base64": median_of(lambda: base64.b64encode(raw), repeats),
    }


def median_of(run: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def measure(bench: Bench, num_rows: int, repeats: int) -> dict[str, float]:
    """Finish and commit times of requests with `num_rows` rows, full history and delta in turn."""
    prompt = np.random.default_rng(num_rows).integers(0, 512, num_rows - NUM_NEW + 1)
    # The first one fills the cache; the others are turns of a conversation that long.
    assert bench.generate(prompt, 0) == num_rows
    finishes, commits = FinishTimes(), CommitTimes(bench.scheduler)
    original = bench.scheduler.committer.commit, bench.scheduler._record
    bench.scheduler.committer.finish_cost = finishes
    commits.install()
    for repeat in range(repeats):
        start = 0 if repeat % 2 == 0 else num_rows - 200
        assert bench.generate(prompt, start) == num_rows - start
    bench.scheduler.committer.commit, bench.scheduler._record = original  # type: ignore[method-assign]
    full, delta = finishes.seconds[0::2], finishes.seconds[1::2]
    return {
        "finish, full history": statistics.median(full),
        "finish, delta of 200": statistics.median(delta),
        "finish, slowest": max(finishes.seconds),
        "commit with a finish": statistics.median(commits.with_finish),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint of the shape routing30b")
    parser.add_argument("--repeats", type=int, default=40)
    args = parser.parse_args()
    results: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="waybill-") as folder:
        bench = Bench(args.model, folder)
        for num_rows in LENGTHS:
            results[num_rows] = measure(bench, num_rows, args.repeats)
            inline = inline_costs(num_rows, 9)
            results[num_rows] |= {f"inline {name}": seconds for name, seconds in inline.items()}
            results[num_rows]["inline, all"] = sum(inline.values())
        bench.close()
    lines = ["| on the step thread, microseconds | " + " | ".join(f"{n} rows" for n in LENGTHS) + " |"]
    lines.append("| --- |" + " ---: |" * len(LENGTHS))
    table = Table(title="microseconds on the step thread")
    table.add_column("")
    for num_rows in LENGTHS:
        table.add_column(f"{num_rows} rows", justify="right")
    for name in results[LENGTHS[0]]:
        cells = [f"{results[n][name] * MICRO:,.0f}" for n in LENGTHS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        table.add_row(name, *cells)
    Console().print(table)
    text = (
        "# What a finishing request costs the step thread\n\n"
        f"`python bench/finish_cost.py`, {args.repeats} finishes a length, medians.\n{describe()}.\n\n"
        + "\n".join(lines)
        + "\n"
    )
    print(write_result("finish_cost.md", text))


if __name__ == "__main__":
    main()
