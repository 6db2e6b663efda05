"""How the output side grows with the number of dp ranks, without a model: real leaders, agreement, ring, output processor
and ledger, driven by a runner that computes tokens and routes by rule (48 layers, top-8 of 128).

Leaders take turns in this process and are timed one by one; the output processor's code is called and timed record by
record. A virtual clock then says what an engine with a forward of so many milliseconds would see: how far filing is behind,
and whether the ring holds the engine up; some runs are also played in real time to an output processor process. Everything
that is shipped is checked against the rule, on large sizes a sample.

    python bench/simulate.py [--write] [--no-live] [--json] [--quick] [--profile]
"""

from __future__ import annotations

import argparse
import gc
import json
import pstats
from collections.abc import Sequence
from cProfile import Profile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from machine import describe, write_result
from simulation.figures import copy_bandwidth, figures_of, prefill_figures
from simulation.leaders import RING_SLOTS
from simulation.live import play
from simulation.report import plot, to_markdown
from simulation.run import FULL, QUICK, Scale, SimulatedEngine
from simulation.timeline import replay
from simulation.workload import VARIANTS

from waybill.engine.text.token_decoder import TokenDecoder
from waybill.engine.text.tokenizer_file import load_token_decoder

TOKENIZER = Path(__file__).parents[1] / "examples" / "tiny_moe" / "checkpoint"
SIZES = (8, 32, 128)
QUICK_SIZES = (2, 4)
# (dp size, variant, forward in ms) of the runs that are played in real time too.
LIVE = ((32, "delta", 20), (32, "full", 20), (128, "delta", 20), (128, "full", 50))
LIVE_STEPS = 100
QUICK_STEPS = 40


def num_steps(dp_size: int) -> int:
    """More where few requests finish."""
    return max(120, 3200 // dp_size)


def simulate(
    dp_size: int, variants: list[str], steps: int, scale: Scale, decoder: TokenDecoder | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All variants at one size, and the prefills of the warm-up."""
    engine = SimulatedEngine(dp_size, decoder, scale)
    prefill = prefill_figures(dp_size, *engine.warm_up())
    runs = [figures_of(engine.run(variant, steps)) for variant in variants]
    close(engine)
    return runs, prefill


def simulate_all(
    sizes: Sequence[int], variants: list[str], steps: int | None, decoder: TokenDecoder | None, *, quick: bool
) -> dict[str, Any]:
    """Runs in the order of variants, and of sizes within one."""
    runs, prefills = [], []
    for dp_size in sizes:
        steps_here = steps or (QUICK_STEPS if quick else num_steps(dp_size))
        runs_here, prefill = simulate(dp_size, variants, steps_here, QUICK if quick else FULL, decoder)
        runs += runs_here
        prefills.append(prefill)
    runs.sort(key=lambda run: (VARIANTS.index(run["variant"]), run["dp"]))
    machine = {"machine": describe(), "copy_bytes_s": copy_bandwidth()}
    return {**machine, "runs": runs, "prefill": prefills, "live": []}


def play_live(dp_size: int, variant: str, forward_ms: int, decoder: TokenDecoder | None) -> dict[str, Any]:
    """One run, by the virtual clock and in real time. Its histories are short, so that the tape is played soon."""
    engine = SimulatedEngine(dp_size, decoder, QUICK, compare=False)
    tape = engine.record()
    engine.warm_up()
    run = engine.run(variant, LIVE_STEPS)
    setups, geometry = engine.leaders.setups, engine.leaders.geometry
    close(engine)
    forward_s = forward_ms / 1e3
    return {
        "dp": dp_size,
        "variant": variant,
        "forward_ms": forward_ms,
        "virtual": asdict(replay(run.steps, forward_s, RING_SLOTS)),
        "virtual_two_locks": asdict(replay(run.steps, forward_s, RING_SLOTS, one_lock=False)),
        "live": asdict(play(tape, setups, geometry, str(TOKENIZER), forward_s)),
    }


def print_profile(dp_size: int, variant: str, decoder: TokenDecoder | None) -> None:
    engine = SimulatedEngine(dp_size, decoder, QUICK, compare=False)
    engine.warm_up()
    profile = Profile()
    engine.run(variant, QUICK_STEPS, profile)
    close(engine)
    pstats.Stats(profile).strip_dirs().sort_stats("tottime").print_stats(16)


def close(engine: SimulatedEngine) -> None:
    """Also what was frozen is garbage then."""
    engine.close()
    gc.unfreeze()
    gc.collect()


def keep(result: dict[str, Any]) -> None:
    """Page, figures and picture."""
    page = write_result("simulate.md", to_markdown(result))
    plot(result, page.with_suffix(".png"))
    page.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dp", type=int, nargs="+", help=f"sizes; {SIZES}, with --quick {QUICK_SIZES}")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, help="steps a variant")
    parser.add_argument("--quick", action="store_true", help="small sizes, short histories, few steps")
    parser.add_argument("--no-live", action="store_true", help="play nothing in real time; --quick never does")
    parser.add_argument(
        "--profile", action="store_true", help="profile the output processor at the largest size instead"
    )
    parser.add_argument("--write", action="store_true", help="keep page, figures and picture in bench/results")
    parser.add_argument("--json", action="store_true", help="print all figures as one object on the last line")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    sizes = args.dp or (QUICK_SIZES if args.quick else SIZES)
    decoder = load_token_decoder(str(TOKENIZER))
    if args.profile:
        for variant in args.variants:
            print_profile(max(sizes), variant, decoder)
        return
    result = simulate_all(sizes, args.variants, args.steps, decoder, quick=args.quick)
    if args.write:
        keep(result)
    if not (args.quick or args.no_live):
        result["live"] = [play_live(*which, decoder) for which in LIVE]
        if args.write:
            keep(result)
    print(to_markdown(result))
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
