"""The proof that a finish on one rank does not stall the others.

Two engines with dp 2 live side by side, one with routing and one without; only one of them works at a time, the other
one sleeps. On rank 0 a conversation with 32k tokens of history (routing shape 48 layers x 8 of 128) finishes turn after
turn; on rank 1 a stream decodes. Each round runs every variant once, in random order:

    off, off2        no routing, twice: their difference is the noise
    inline           what other engines do: the step thread gathers, serialises and encodes the whole history, int32
    inline_compact   the step thread slices the whole history, uint8
    full             Waybill, the whole history
    delta            Waybill, from what the caller holds on

    python bench/stall.py [--quick] [--json] [--write]
    python bench/stall.py --device cuda [--minutes 1]    two GPUs of 80 GB, the model of full width with random weights
    python bench/stall.py --device cpu --dummy --history 500 --quick    a dry run of that at the narrow width
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from caller_priority import lower_priority, run_in_own_session
from machine import write_result
from make_models import ensure_checkpoint, write_config
from model_shapes import SHAPES as ALL_SHAPES
from stall_report import VariantScores, as_json, plot, report, score
from stall_segment import (
    FIRST_TOKEN,
    STEADY_RANK,
    TURN_OUTPUT,
    TURN_PROMPT,
    VARIANTS,
    WITHOUT_ROUTING,
    Segment,
    run_segment,
)
from tapped_engine import TappedEngine
from time_limit import end_after

from waybill.engine.output.config import LOW_PRIORITY

RESULTS = Path(__file__).parent / "results"
# Room for what conversations add to the history before it is evicted.
SPARE_KV_TOKENS = 8192
# With a bound on the rounds: what starting, one round and the report may take beside.
GRACE_S = 240.0
# By device: the shape, which has the routing shape of the other, and what both engines are started with. Two engines of
# the full width share two GPUs of 80 GB: 32 GB of weights and 4 GB of KV cache each.
SHAPES = {"cpu": "routing30b", "cuda": "30b"}
OPTIONS = {"cpu": {"num_threads": 1}, "cuda": {"max_running_requests": 8}}


class StallBench:
    """Both engines, with the history in the prefix cache of all ranks but the steady one, and the segments that ran on
    them."""

    def __init__(
        self, model_path: str, device: str, load_format: str, history_tokens: int, seed: int, dp_size: int = 2
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.busy_ranks = [rank for rank in range(dp_size) if rank != STEADY_RANK]
        options = {
            "dp_size": dp_size,
            "tp_size": 1,
            "device": device,
            "load_format": load_format,
            "kv_cache_tokens": history_tokens + SPARE_KV_TOKENS,
            **OPTIONS[device],
        }
        self.routing = TappedEngine(model_path, with_inline=True, enable_return_routed_experts=True, **options)
        self.plain = TappedEngine(model_path, **options)
        self.segments: dict[str, list[Segment]] = defaultdict(list)
        for tapped in (self.routing, self.plain):
            tapped.take_steps()
        self.history = self._draw(history_tokens, int(self.plain.state["vocab_size"]))
        # Prefilling 32k tokens takes minutes on one core, and the two engines need not take turns yet; on GPUs the
        # collectives of one would wait for those of the other.
        with ThreadPoolExecutor(max_workers=2 if device == "cpu" else 1) as pool:
            list(pool.map(self._prefill, (self.routing, self.plain)))

    def _prefill(self, tapped: TappedEngine) -> None:
        params = {"max_new_tokens": 1, "ignore_eos": True}
        with ThreadPoolExecutor(max_workers=len(self.busy_ranks)) as pool:
            for answer in [
                pool.submit(tapped.engine.generate, input_ids=self.history, sampling_params=params, routed_dp_rank=rank)
                for rank in self.busy_ranks
            ]:
                answer.result()
        tapped.take_steps()

    def _draw(self, num: int, vocab_size: int) -> list[int]:
        return self.rng.integers(FIRST_TOKEN, vocab_size, num).tolist()

    def engine_of(self, variant: str) -> TappedEngine:
        return self.plain if variant in WITHOUT_ROUTING else self.routing

    def run(self, variant: str, name: str, num_turns: int) -> Segment:
        return asyncio.run(run_segment(self.engine_of(variant), variant, name, self.history, num_turns, self.rng))

    def round(self, number: int, num_turns: int) -> None:
        """Kept when it is whole: ratios pair the variants of a round."""
        found = {
            str(variant): self.run(str(variant), str(number), num_turns) for variant in self.rng.permutation(VARIANTS)
        }
        for variant, segment in found.items():
            self.segments[variant].append(segment)

    def scores(self) -> dict[str, VariantScores]:
        return {variant: score(variant, self.segments[variant]) for variant in VARIANTS}

    def close(self) -> None:
        self.routing.close()
        self.plain.close()


def run_rounds(bench: StallBench, options: argparse.Namespace, began: float) -> int:
    """Rounds until there are enough or the time is over, one at least; how many there were. One that fails is the last one,
    and what was measured before it is still worth a report."""
    for number in range(options.rounds):
        if number and options.minutes is not None and time.monotonic() - began > 60 * options.minutes:
            return number
        try:
            bench.round(number, options.turns)
        except (AssertionError, RuntimeError) as error:
            if number == 0:
                raise
            print(f"round {number + 1} failed: {error!r}", file=sys.stderr, flush=True)
            return number
        took = time.monotonic() - began
        print(f"round {number + 1} of {options.rounds}, {took:.0f} s", file=sys.stderr, flush=True)
    return options.rounds


def measure(options: argparse.Namespace, model: str, shape: str) -> tuple[dict[str, VariantScores], str]:
    """Scores and report."""
    load = os.getloadavg()[0]
    began = time.monotonic()
    load_format = "dummy" if options.dummy else "auto"
    bench = StallBench(model, options.device, load_format, options.history, options.seed)
    lower_priority(LOW_PRIORITY)
    print(f"both engines have the history, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    # The first segments warm up; nothing of them is kept.
    for variant in VARIANTS:
        bench.run(variant, "warm-up", 1)
    ready = time.monotonic()
    num_rounds = run_rounds(bench, options, began)
    scores = bench.scores()
    setting = (
        f"{num_rounds} rounds of {options.turns} turns a variant on {options.history} tokens of history; a turn has "
        f"{TURN_PROMPT} tokens of prompt and {TURN_OUTPUT} of output.\n{ready - began:.0f} s to start and to prefill, "
        f"{time.monotonic() - ready:.0f} s of rounds. Load average before the run: {load:.1f}. Model: shape {shape} of "
        "`bench/make_models.py`, random weights."
    )
    name = "stall" if options.device == "cpu" else "stall_gpu"
    command = "make bench-stall" if options.device == "cpu" else 'make bench-stall ARGS="--device cuda"'
    text = report(scores, bench.routing.state, setting, command, options.device, f"{name}.png")
    bench.close()
    if options.write and not options.quick:
        write_result(f"{name}.md", text)
        figures = as_json(scores)
        write_result(f"{name}.json", json.dumps(figures) + "\n")
        plot({variant: of["worst_ms"] for variant, of in figures.items()}, RESULTS / f"{name}.png")
    return scores, text


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(SHAPES), default="cpu", help="cuda: two GPUs")
    parser.add_argument("--shape", choices=ALL_SHAPES, help="of make_models.py; the device's if not given")
    parser.add_argument("--model", help="checkpoint of that shape; made in models/ if not given")
    parser.add_argument("--dummy", action="store_true", help="random weights made by the ranks; always so on cuda")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--turns", type=int, default=14, help="finishes of a variant in a round")
    parser.add_argument(
        "--minutes", type=float, help="begin no round later than this after the start, but for the first"
    )
    parser.add_argument("--history", type=int, default=32768 - 8, help="tokens before the first turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two rounds of four turns, for a look")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--write", action="store_true", help="keep report and plot in bench/results")
    options = parser.parse_args()
    options.dummy = (options.dummy or options.device == "cuda") and options.model is None
    if options.quick:
        options.rounds, options.turns = 2, 4
    return options


def main() -> int:
    options = parse_options()
    status = run_in_own_session()
    if status is not None:
        return status
    if options.minutes is not None:
        end_after(60 * options.minutes + GRACE_S)
    shape = options.shape or SHAPES[options.device]
    with tempfile.TemporaryDirectory(prefix="waybill-stall-") as folder:
        if options.dummy:
            write_config(shape, Path(folder))
        model = options.model or (folder if options.dummy else str(ensure_checkpoint(shape)))
        scores, text = measure(options, model, shape)
    print(text, flush=True)
    if options.json:
        sys.stdout.write(json.dumps(as_json(scores)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
