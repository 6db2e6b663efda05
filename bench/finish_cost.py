"""What a finishing request costs the rank's step thread, at 1k, 8k and 32k rows of routing (48 layers, top-8 of 128).

The real leader (scheduler, planner, committer, pages, model runner, ring) runs in this process, with a real output
processor beside it. `finish` is the work that a finish adds to the step thread: prefix-cache insert, page release and
leaving the queues. `commit` is everything between a step's result and its record being on the socket, in a step with a
finish. Beside it, in the same process, the inline algorithm: gather the rows by slot as int32,
serialise, base64.

    python bench/make_models.py routing30b --out /tmp/routing30b
    python bench/finish_cost.py --model /tmp/routing30b [--device cuda --out finish_cost_gpu.md]
"""

from __future__ import annotations

import argparse
import base64
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from machine import describe, write_result
from output_side import Surroundings
from rich.console import Console
from rich.table import Table

from waybill.engine.config import EngineConfig
from waybill.engine.io_struct import OutputBatch, OutputOptions, SamplingParams
from waybill.engine.ipc.frontend_messages import TokenizedGenerateReqInput
from waybill.engine.replica import load_rank, make_scheduler
from waybill.engine.scheduler.scheduler import Scheduler
from waybill.engine.scheduler.step_committer import FinishCost
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
        record = self.scheduler.recorder.record_step

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
        self.scheduler.recorder.record_step = timed_record  # type: ignore[method-assign]


class Bench:
    """A leader in this process and an output processor in another."""

    def __init__(self, model_path: str, folder: str, device: str) -> None:
        config = EngineConfig(
            model_path=model_path,
            kv_cache_tokens=2 * max(LENGTHS),
            max_running_requests=4,
            enable_return_routed_experts=True,
        )
        self.surroundings = Surroundings(folder, model_path)
        self.outbox, self.answers = self.surroundings.outbox, self.surroundings.answers
        mesh = ParallelMesh.single(torch.device(device))
        self.scheduler = make_scheduler(load_rank(config, mesh), self.surroundings.endpoints)
        self.num_sent = 0

    def generate(self, prompt: np.ndarray, start_len: int) -> int:
        """Run one request to its answer; returns the rows that arrived."""
        self.num_sent += 1
        self.outbox.send(
            TokenizedGenerateReqInput(
                seq=self.num_sent,
                rid=f"r{self.num_sent}",
                input_ids=prompt.astype("<i4").tobytes(),
                sampling_params=SamplingParams(max_new_tokens=NUM_NEW, temperature=0.0, ignore_eos=True),
                output_options=OutputOptions(return_routed_experts=True, routed_experts_start_len=start_len),
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
    committer, recorder = bench.scheduler.committer, bench.scheduler.recorder
    original = committer.commit, recorder.record_step
    committer.finish_cost = finishes
    commits.install()
    for repeat in range(repeats):
        start = 0 if repeat % 2 == 0 else num_rows - 200
        assert bench.generate(prompt, start) == num_rows - start
    committer.commit, recorder.record_step = original  # type: ignore[method-assign]
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
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", default="finish_cost.md", help="name of the result in bench/results")
    args = parser.parse_args()
    results: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="waybill-") as folder:
        bench = Bench(args.model, folder, args.device)
        for num_rows in LENGTHS:
            results[num_rows] = measure(bench, num_rows, args.repeats)
            inline = inline_costs(num_rows, 9)
            results[num_rows] |= {f"inline {name}": seconds for name, seconds in inline.items()}
            results[num_rows]["inline, all"] = sum(inline.values())
        bench.surroundings.close()
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
    print(write_result(args.out, text))


if __name__ == "__main__":
    main()
