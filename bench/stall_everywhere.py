"""Finishes on all dp ranks but one, somewhere in most steps, and what they do to the latencies of that one.

As `stall.py`, with more dp ranks and without pauses: on every other rank a conversation with a long history (32k tokens)
finishes turn after turn, each turn sent as soon as its caller has the last answer; on rank 1 a stream decodes. Scored are
all intervals between rank 1's commits from the first finish of a round to its last. With routing off the ranks have the
same conversations; only nobody ships routes.

    python bench/stall_everywhere.py --dp 8                                              eight GPUs of 80 GB
    python bench/stall_everywhere.py --dp 4 --device cpu --shape toy30b --history 200    a dry run
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from caller_priority import lower_priority, run_in_own_session
from make_models import write_config
from marked_results import say
from model_shapes import SHAPES
from stall import StallBench
from stall_scores import MILLI, Ratio, median, p99, paired_ratio
from stall_segment import (
    DELTA,
    FIRST_TOKEN,
    FULL,
    OFF,
    OFF_AGAIN,
    STEADY_RANK,
    STREAM_PROMPT,
    Conversation,
    SteadyStream,
    steady_stream,
    wait_until_idle,
)
from step_log import StepEntry
from tapped_engine import TappedEngine

from waybill.engine.output.config import LOW_PRIORITY

VARIANTS = (OFF, OFF_AGAIN, FULL, DELTA)


@dataclass(frozen=True)
class BusySegment:
    """One variant's turns of a round."""

    # Milliseconds between the steady rank's commits, and how many of these steps had a finish somewhere.
    intervals: list[float]
    num_with_finish: int
    # Milliseconds from a finish on its leader to the answer in its caller's hands.
    lags: list[float]
    processor_cpu_s: float
    caller_cpu_s: float


def busy_segment(
    steps: Sequence[Sequence[StepEntry]], answered_s: dict[str, float], processor_cpu_s: float, caller_cpu_s: float
) -> BusySegment:
    """From each leader's steps, and when the callers had their answers."""
    finished = {
        rid: entry
        for rank, entries in enumerate(steps)
        for entry in entries
        for rid in (entry.finished if rank != STEADY_RANK else ())
        if rid in answered_s
    }
    assert len(finished) == len(answered_s), "every answer has its finish"
    finishes = {entry.step for entry in finished.values()}
    steady = {entry.step: entry for entry in steps[STEADY_RANK] if entry.num_tokens}
    scored = [step for step in range(min(finishes) + 1, max(finishes) + 1) if step in steady and step - 1 in steady]
    intervals = [MILLI * (steady[step].committed_s - steady[step - 1].committed_s) for step in scored]
    lags = [MILLI * (answered_s[rid] - entry.committed_s) for rid, entry in finished.items()]
    return BusySegment(intervals, len(finishes.intersection(scored)), lags, processor_cpu_s, caller_cpu_s)


async def run_busy(bench: StallBench, tapped: TappedEngine, variant: str, name: str, num_turns: int) -> BusySegment:
    """`num_turns` finishes on each rank but the steady one."""
    vocab_size = int(tapped.state["vocab_size"])
    prompt = bench.rng.integers(FIRST_TOKEN, vocab_size, STREAM_PROMPT).tolist()
    conversations = [
        Conversation(variant, f"{name}-{rank}", bench.history, bench.rng, rank) for rank in bench.busy_ranks
    ]

    async def talk(number: int, conversation: Conversation, stream: SteadyStream) -> None:
        # One step after another, or all ranks would finish in the same ones.
        await stream.wait_for(number)
        for _ in range(num_turns):
            await conversation.turn(tapped.engine, vocab_size)

    processor, caller = tapped.processor_cpu_s(), time.process_time()
    async with steady_stream(tapped.engine, prompt, variant) as stream:
        await asyncio.gather(*(talk(number, each, stream) for number, each in enumerate(conversations)))
    await asyncio.to_thread(wait_until_idle, tapped)
    answered_s = {rid: moment for each in conversations for rid, moment in each.answered_s.items()}
    steps = await asyncio.to_thread(tapped.take_steps)
    return busy_segment(steps, answered_s, tapped.processor_cpu_s() - processor, time.process_time() - caller)


def scores(segments: dict[str, list[BusySegment]]) -> list[dict[str, Any]]:
    """By variant; ratios are paired by round."""
    off = [segment.intervals for segment in segments[OFF]]
    lines = []
    for variant, of in segments.items():
        intervals = [segment.intervals for segment in of]
        pooled = np.concatenate([np.asarray(values) for values in intervals])
        lags = np.concatenate([np.asarray(segment.lags) for segment in of])
        lines.append(
            {
                "variant": variant,
                "finishes": len(lags),
                "steps": len(pooled),
                "with_finish": sum(segment.num_with_finish for segment in of) / len(pooled),
                "median_ms": median(pooled),
                "p99_ms": p99(pooled),
                "median_over_off": bounds(paired_ratio(intervals, off, median)),
                "p99_over_off": bounds(paired_ratio(intervals, off, p99)),
                "lag_median_ms": median(lags),
                "lag_p99_ms": p99(lags),
                "processor_cpu_ms": MILLI * sum(segment.processor_cpu_s for segment in of) / len(lags),
                "caller_cpu_ms": MILLI * sum(segment.caller_cpu_s for segment in of) / len(lags),
            }
        )
    return lines


def bounds(ratio: Ratio) -> tuple[float, float, float]:
    return ratio.value, ratio.low, ratio.high


def run_rounds(bench: StallBench, options: argparse.Namespace) -> dict[str, list[BusySegment]]:
    """Whole ones, in which every variant runs, until there are enough, the time is over or one fails; one at least."""
    segments: dict[str, list[BusySegment]] = {variant: [] for variant in VARIANTS}
    began = time.monotonic()
    for number in range(options.rounds + 1):
        if number > 1 and time.monotonic() - began > 60 * options.minutes:
            break
        try:
            found = {
                variant: asyncio.run(run_busy(bench, bench.engine_of(variant), variant, str(number), options.turns))
                for variant in map(str, bench.rng.permutation(VARIANTS))
            }
        except (AssertionError, RuntimeError) as error:
            if number <= 1:
                raise
            print(f"round {number} failed: {error!r}", file=sys.stderr, flush=True)
            break
        # Nothing is kept of the first round: it warms up.
        for variant, segment in found.items() if number else ():
            segments[variant].append(segment)
    return segments


def measure(options: argparse.Namespace, model: str) -> None:
    bench = StallBench(model, options.device, "dummy", options.history, options.seed, options.dp)
    lower_priority(LOW_PRIORITY)
    segments = run_rounds(bench, options)
    ring_waits = [rank["routing_ring_waits"] for rank in bench.routing.state["dp_ranks"]]
    for line in scores(segments):
        say("stall", dp=options.dp, history=options.history, ring_waits=sum(ring_waits), **line)
    bench.close()
    say("done")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dp", type=int, required=True, help="dp ranks, two at least")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="30b", help="of make_models.py")
    parser.add_argument("--history", type=int, default=32768 - 8, help="tokens before the first turn")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=6.0, help="begin no round later than this")
    parser.add_argument("--turns", type=int, default=14, help="finishes of a rank in a variant's part of a round")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.dp < 2:
        parser.error(f"--dp {options.dp}: must be at least 2")
    status = run_in_own_session()
    if status is not None:
        return status
    with tempfile.TemporaryDirectory(prefix="waybill-stall-") as folder:
        write_config(options.shape, Path(folder))
        measure(options, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
