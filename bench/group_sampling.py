"""Samples of one prompt: steps and tokens a second, beside what they took when samples were admitted one a step.

    python bench/group_sampling.py [--model CHECKPOINT] [--rounds 3] [--write]

One leader in this process, an output processor in another, routes captured. Three rules of admission take turns in one
run, so that what else the machine does touches all alike: `shared`, the engine's (the others wait for the first one's
prefill and then run together); `one a step`, the rule before it, which lives here alone (a sample waits as long as another
one computes any prompt token, be it its last); `not shared`, as equal prompts without `n` ran before it (all compute the
whole prompt).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from io import StringIO

import numpy as np
import torch
from machine import describe, write_result
from output_side import Surroundings
from rich import box
from rich.console import Console
from rich.table import Table

from waybill.engine.config import EngineConfig
from waybill.engine.io_struct import OutputOptions, SamplingParams
from waybill.engine.ipc.frontend_messages import TokenizedGenerateReqInput
from waybill.engine.replica import load_rank, make_scheduler
from waybill.engine.scheduler.page_manager import PageManager
from waybill.engine.scheduler.req import Req
from waybill.engine.scheduler.shared_prefills import SharedPrefills
from waybill.launch.args import EMBEDDED_MODEL
from waybill.parallel.mesh import ParallelMesh

NUM_SAMPLES = (1, 8, 64)
PROMPTS = (16, 512)
NUM_NEW = 32
ROUTED = OutputOptions(return_routed_experts=True)
# Below are special tokens in most vocabularies; above, none of the embedded model's.
TOKENS = (0, 256)


class OneAStep(SharedPrefills):
    def must_wait(self, req: Req, running: Iterable[Req]) -> bool:
        prompt = req.recv.input_ids
        return any(
            other.recv.input_ids == prompt and other.num_committed < other.num_prompt_tokens for other in running
        )


class NotShared(SharedPrefills):
    def must_wait(self, req: Req, running: Iterable[Req]) -> bool:
        return False


RULES: dict[str, type[SharedPrefills]] = {"shared": SharedPrefills, "one a step": OneAStep, "not shared": NotShared}


@dataclass(frozen=True)
class Case:
    num_samples: int
    num_prompt: int


@dataclass(frozen=True)
class Run:
    """One run of a case. `cpu_s` is the processor time of the leader's process, which what else the machine does hardly
    touches."""

    steps: int
    seconds: float
    cpu_s: float


class Bench:
    """A leader of its own device, whose rule of admission is changed between two idle moments."""

    def __init__(self, model_path: str, folder: str, device: str) -> None:
        config = EngineConfig(
            model_path=model_path,
            kv_cache_tokens=max(NUM_SAMPLES) * (max(PROMPTS) + NUM_NEW) + max(PROMPTS),
            max_running_requests=max(NUM_SAMPLES),
            enable_return_routed_experts=True,
        )
        self.surroundings = Surroundings(folder, model_path)
        mesh = ParallelMesh.single(torch.device(device))
        self.scheduler = make_scheduler(load_rank(config, mesh), self.surroundings.endpoints)
        self._num_sent = 0
        self._rng = np.random.default_rng(0)

    def run(self, case: Case, rule: type[SharedPrefills]) -> Run:
        """From the arrival of all samples until all have ended; each prompt is new."""
        pages: PageManager = self.scheduler._pages
        self.scheduler._planner._shared_prefills = rule(pages)
        prompt = self._rng.integers(*TOKENS, case.num_prompt).astype("<i4").tobytes()
        for _ in range(case.num_samples):
            self._send(prompt)
        while len(self.scheduler.queues) < case.num_samples:
            self.scheduler.receive()
        num_steps, began, cpu_began = self._num_steps, time.perf_counter(), time.process_time()
        while not self.scheduler.is_idle:
            self.scheduler.step()
        return Run(self._num_steps - num_steps, time.perf_counter() - began, time.process_time() - cpu_began)

    @property
    def _num_steps(self) -> int:
        return int(self.scheduler.state()["num_steps"])

    def _send(self, prompt: bytes) -> None:
        self._num_sent += 1
        params = SamplingParams(max_new_tokens=NUM_NEW, temperature=1.0, ignore_eos=True, sampling_seed=self._num_sent)
        self.surroundings.outbox.send(
            TokenizedGenerateReqInput(self._num_sent, f"r{self._num_sent}", prompt, params, ROUTED)
        )


def measure(bench: Bench, rounds: int) -> dict[tuple[Case, str], list[Run]]:
    """By case and rule, every round's run; the rules take turns."""
    found: dict[tuple[Case, str], list[Run]] = defaultdict(list)
    cases = [Case(num_samples, num_prompt) for num_prompt in PROMPTS for num_samples in NUM_SAMPLES]
    for case in cases:
        bench.run(case, SharedPrefills)
    for _ in range(rounds):
        for case in cases:
            for name, rule in RULES.items():
                found[case, name].append(bench.run(case, rule))
    return found


def report(found: dict[tuple[Case, str], list[Run]], model: str, rounds: int) -> str:
    table = Table(
        "prompt",
        "n",
        "rule",
        "steps",
        "tokens/s",
        "seconds, all rounds",
        "CPU s",
        "CPU s / one a step",
        box=box.MARKDOWN,
    )
    for (case, name), runs in found.items():
        seconds = statistics.median(run.seconds for run in runs)
        cpu_s = statistics.median(run.cpu_s for run in runs)
        before = statistics.median(run.cpu_s for run in found[case, "one a step"])
        (steps,) = {run.steps for run in runs}
        table.add_row(
            str(case.num_prompt),
            str(case.num_samples),
            name,
            str(steps),
            f"{case.num_samples * NUM_NEW / seconds:.0f}",
            " ".join(f"{run.seconds:.2f}" for run in runs),
            f"{cpu_s:.2f}",
            f"{cpu_s / before:.2f}",
        )
    text = StringIO()
    Console(file=text, width=160).print(table)
    return "\n".join(
        [
            "# Samples of one prompt",
            "",
            f"{describe()}. Model: {model}. {NUM_NEW} new tokens a sample, routes captured and shipped;",
            f"medians of {rounds} rounds in which the rules take turns. Steps are the same in every round.",
            "",
            text.getvalue().strip(),
            "",
            "`shared` is the engine's rule: the samples wait until the first one's prompt is in the prefix cache, then run",
            "together. `one a step` is the rule before it, `not shared` how equal prompts of a batch ran before it.",
            "",
            "Steps are exact. Where the rounds of a row differ widely the machine was busy with something else; then the",
            "medians of seconds say little, and CPU seconds (which also count threads that wait for each other) only",
            "somewhat more.",
            "",
            "Made by `python bench/group_sampling.py --write`.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Steps and tokens a second of samples of one prompt")
    parser.add_argument("--model", default=str(EMBEDDED_MODEL))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="keep the result in bench/results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="waybill-") as folder:
        bench = Bench(options.model, folder, options.device)
        try:
            found = measure(bench, options.rounds)
        finally:
            bench.surroundings.close()
    name = "the embedded one" if options.model == str(EMBEDDED_MODEL) else options.model
    text = report(found, name, options.rounds)
    print(text)
    if options.write:
        write_result("group_sampling.md", text)


if __name__ == "__main__":
    main()
