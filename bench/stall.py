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
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from caller_priority import lower_priority, run_in_own_session
from machine import write_result
from make_models import ensure_checkpoint
from rich.console import Console
from stall_report import VariantScores, as_json, plot, report, score
from stall_segment import (
    BUSY_RANK,
    FIRST_TOKEN,
    TURN_OUTPUT,
    TURN_PROMPT,
    VARIANTS,
    WITHOUT_ROUTING,
    Segment,
    run_segment,
)
from tapped_engine import TappedEngine

from waybill.engine.output.config import LOW_PRIORITY

RESULTS = Path(__file__).parent / "results"
# Room for what conversations add to the history before it is evicted.
SPARE_KV_TOKENS = 8192


class StallBench:
    """Both engines, with the history in the prefix cache of rank 0, and the segments that ran on them."""

    def __init__(self, model_path: str, history_tokens: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        options = {
            "dp_size": 2,
            "tp_size": 1,
            "num_threads": 1,
            "kv_cache_tokens": history_tokens + SPARE_KV_TOKENS,
        }
        self.routing = TappedEngine(model_path, with_inline=True, enable_return_routed_experts=True, **options)
        self.plain = TappedEngine(model_path, **options)
        self.segments: dict[str, list[Segment]] = defaultdict(list)
        for tapped in (self.routing, self.plain):
            tapped.take_steps()
        self._history = self._draw(history_tokens, int(self.plain.state["vocab_size"]))
        # Prefilling 32k tokens takes minutes on one core, and the two engines need not take turns yet.
        with ThreadPoolExecutor() as pool:
            list(pool.map(self._prefill, (self.routing, self.plain)))

    def _prefill(self, tapped: TappedEngine) -> None:
        tapped.engine.generate(
            input_ids=self._history,
            sampling_params={"max_new_tokens": 1, "ignore_eos": True},
            routed_dp_rank=BUSY_RANK,
        )
        tapped.take_steps()

    def _draw(self, num: int, vocab_size: int) -> list[int]:
        return self.rng.integers(FIRST_TOKEN, vocab_size, num).tolist()

    def run(self, variant: str, name: str, num_turns: int) -> Segment:
        tapped = self.plain if variant in WITHOUT_ROUTING else self.routing
        return asyncio.run(run_segment(tapped, variant, name, self._history, num_turns, self.rng))

    def round(self, number: int, num_turns: int) -> None:
        for variant in self.rng.permutation(VARIANTS):
            self.segments[str(variant)].append(self.run(str(variant), str(number), num_turns))

    def scores(self) -> dict[str, VariantScores]:
        return {variant: score(variant, self.segments[variant]) for variant in VARIANTS}

    def close(self) -> None:
        self.routing.close()
        self.plain.close()


def is_late(began: float, minutes: float | None) -> bool:
    return minutes is not None and time.monotonic() - began > 60 * minutes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint of the shape routing30b; made in models/ if not given")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--turns", type=int, default=14, help="finishes of a variant in a round")
    parser.add_argument("--minutes", type=float, help="begin no round later than this after the start")
    parser.add_argument("--history", type=int, default=32768 - 8, help="tokens before the first turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two rounds of four turns, for a look")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--write", action="store_true", help="keep report and plot in bench/results")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.turns = 2, 4
    status = run_in_own_session()
    if status is not None:
        return status
    load = os.getloadavg()[0]
    began = time.monotonic()
    bench = StallBench(options.model or str(ensure_checkpoint("routing30b")), options.history, options.seed)
    lower_priority(LOW_PRIORITY)
    # The first segments warm up; nothing of them is kept.
    for variant in VARIANTS:
        bench.run(variant, "warm-up", 1)
    ready = time.monotonic()
    num_rounds = 0
    while num_rounds < options.rounds and not is_late(began, options.minutes):
        bench.round(num_rounds, options.turns)
        num_rounds += 1
        print(f"round {num_rounds} of {options.rounds}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    scores = bench.scores()
    setting = (
        f"{num_rounds} rounds of {options.turns} turns a variant on {options.history} tokens of history; a turn has "
        f"{TURN_PROMPT} tokens of prompt and {TURN_OUTPUT} of output.\n{ready - began:.0f} s to start and to prefill, "
        f"{time.monotonic() - ready:.0f} s of rounds. Load average before the run: {load:.1f}."
    )
    text = report(scores, bench.routing.state, setting, "make bench-stall")
    bench.close()
    Console(width=140).print(text, markup=False, highlight=False)
    if options.write and not options.quick:
        plot(scores, RESULTS / "stall.png")
        write_result("stall.md", text)
        write_result("stall.json", json.dumps(as_json(scores)) + "\n")
    if options.json:
        sys.stdout.write(json.dumps(as_json(scores)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
