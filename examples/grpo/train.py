"""GRPO with routes replayed: `./examples/grpo/run.sh` starts this file on every trainer rank.

Trainer rank 0 holds the engine, whose ranks are processes of their own, and the group over which it sends new weights.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from options import parse_options
from policy import group_advantages
from progress import ProgressReport
from rollouts import Rollout, RolloutMaker
from tokenizers import Tokenizer
from trainer import Trainer, share_rollouts

from waybill import Engine
from waybill.engine.weight_sync.sender import NamedTensor, WeightSender

ENGINE_RANKS = 2


class Generator:
    """Trainer rank 0's half: the engine, its rollouts, and its weights."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._in_flight: bool = options.in_flight
        self._engine = Engine(
            options.model,
            tp_size=ENGINE_RANKS,
            dtype=options.engine_dtype,
            max_running_requests=options.dialogues * options.samples,
            enable_return_routed_experts=True,
            weight_version="step-0",
        )
        dtype = torch.bfloat16 if options.engine_dtype == "bfloat16" else torch.float32
        self._sender = WeightSender([(self._engine, ENGINE_RANKS)], dtype=dtype)
        self._sender.connect()
        tokenizer = Tokenizer.from_file(f"{options.model}/tokenizer.json")
        self._maker = RolloutMaker(self._engine, tokenizer, options)
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._next = self._thread.submit(self._maker.roll_out)

    def next_rollouts(self, *, more: bool) -> list[Rollout]:
        """The batch under way; with updates in flight the one after it begins at once."""
        rollouts = self._next.result()
        if self._in_flight and more:
            self._next = self._thread.submit(self._maker.roll_out)
        return rollouts

    def update(self, tensors: Iterator[NamedTensor], step: int, *, more: bool) -> float:
        """New weights; seconds that it took. In flight, requests stay where they are and go on with the new ones."""
        began = time.perf_counter()
        if self._in_flight:
            self._engine.pause_generation("in_place")
        self._sender.send(tensors, weight_version=f"step-{step}", flush_cache=not self._in_flight)
        if self._in_flight:
            self._engine.continue_generation()
        seconds = time.perf_counter() - began
        if not self._in_flight and more:
            self._next = self._thread.submit(self._maker.roll_out)
        return seconds

    def close(self) -> None:
        self._thread.shutdown()
        self._sender.close()
        self._engine.shutdown()


def run_step(
    options: argparse.Namespace, trainer: Trainer, generator: Generator | None, report: ProgressReport | None, step: int
) -> None:
    """Rollouts, training, new weights; on every rank."""
    more = step < options.steps
    began = time.perf_counter()
    if report is not None:
        report.say("rollouts")
    rollouts = share_rollouts(None if generator is None else generator.next_rollouts(more=more))
    rolled_out = time.perf_counter()
    if report is not None:
        report.say("training")
    kl, extreme, num_tokens = trainer.train(rollouts).tolist()
    trained = time.perf_counter()
    if generator is None:
        for _ in trainer.tensors():
            pass
        return
    assert report is not None
    report.say("new weights")
    sync_s = generator.update(trainer.tensors(), step, more=more)
    report.add(
        {
            "step": step,
            "reward": sum(rollout.reward for rollout in rollouts) / len(rollouts),
            # Rollouts that have something to teach: without an advantage a step learns nothing from them.
            "signal": float(group_advantages(rollouts).any(dim=1).double().mean()),
            "mismatch_kl": kl / num_tokens,
            "extreme_share": extreme / num_tokens,
            "rollout_s": rolled_out - began,
            "train_s": trained - rolled_out,
            "sync_s": sync_s,
            "tokens_per_s": sum(len(rollout.tokens) for rollout in rollouts) / (time.perf_counter() - began),
            "sampled_tokens": int(num_tokens),
            "weight_versions": sorted({version for rollout in rollouts for version in rollout.weight_versions}),
        }
    )


def main() -> None:
    options = parse_options()
    # On a CPU its own all-reduce needs a compiler and is not used in training.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    torch.manual_seed(options.seed)
    trainer = Trainer(options)
    how = [
        "own routes" if options.no_replay else "routes replayed",
        *(["updates in flight"] if options.in_flight else []),
    ]
    title = f"GRPO, {', '.join(how)}, seed {options.seed}"
    with ExitStack() as stack:
        generator = report = None
        if dist.get_rank() == 0:
            generator = Generator(options)
            stack.callback(generator.close)
            report = stack.enter_context(ProgressReport(Path(options.out), options.steps, title))
        stack.enter_context(trainer.replaying())
        for step in range(1, options.steps + 1):
            run_step(options, trainer, generator, report, step)
    if report is not None:
        print(f"log: {report.log_file}\nplot: {report.plot_file}")
    # Threads of gloo that outlive the process would end it by SIGABRT now and then.
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
