"""The loop for several seeds, with the engine's routes replayed and without: one figure and one table of all runs.

    .venv/bin/python examples/grpo/compare.py --seeds 0 1 2 -- --steps 60        # what follows -- goes to run.sh

Runs are kept under `--out` and not repeated while their options are the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))
from machine import describe, write_result  # noqa: E402
from options import EARLY, parse_options  # noqa: E402

MODES = {"replayed": ("routes replayed", [], "tab:blue"), "own": ("own routes", ["--no-replay"], "tab:orange")}
# The rewards of both lie on each other.
STYLES = {"replayed": "-", "own": "--"}
# Steps at either end over which a run's reward is averaged.
EDGE = 5
Log = list[dict[str, Any]]


def read_log(folder: Path) -> Log:
    file = folder / "log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def run(folder: Path, seed: int, flags: list[str], options: list[str]) -> Log:
    """One run, or its log if it is there, whole and of the same options."""
    arguments = ["--seed", str(seed), "--out", str(folder), *flags, *options]
    wanted = vars(parse_options(arguments, may_be_missing=(EARLY,)))
    done = folder / "options.json"
    if not done.is_file() or json.loads(done.read_text()) != wanted:
        done.unlink(missing_ok=True)
        subprocess.run([str(ROOT / "examples/grpo/run.sh"), *arguments], check=True, stdout=subprocess.DEVNULL)
        done.write_text(json.dumps(wanted))
    return read_log(folder)


def settings(options: list[str]) -> str:
    """All options that the runs share, the defaults among them."""
    resolved = vars(parse_options(options, may_be_missing=(EARLY,)))
    own = ("model", "out", "seed", "no_replay")
    return ", ".join(f"{name} {value}" for name, value in resolved.items() if name not in own)


def mean_of(log: Log, key: str, steps: slice = slice(None)) -> float:
    return statistics.fmean(step[key] for step in log[steps])


def table(runs: dict[tuple[str, int], Log]) -> str:
    lines = [
        "| routes | seed | steps | reward, first 5 | reward, last 5 | KL, median | extreme tokens | sync s, median |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (mode, seed), log in runs.items():
        kl, sync = (statistics.median(step[key] for step in log) for key in ("mismatch_kl", "sync_s"))
        lines.append(
            f"| {MODES[mode][0]} | {seed} | {len(log)} | {mean_of(log, 'reward', slice(EDGE)):.3f} | "
            f"{mean_of(log, 'reward', slice(-EDGE, None)):.3f} | {kl:.2e} | {mean_of(log, 'extreme_share'):.3%} | "
            f"{sync:.2f} |"
        )
    return "\n".join(lines)


def plot(runs: dict[tuple[str, int], Log], file: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for axis, key, label in zip(
        axes, ("reward", "mismatch_kl"), ("reward: share of right turns", "KL(engine || trainer)"), strict=True
    ):
        for mode, (_, _, color) in MODES.items():
            logs = [log for (own_mode, _), log in runs.items() if own_mode == mode]
            for log in logs:
                numbers, values = [step["step"] for step in log], [step[key] for step in log]
                axis.plot(numbers, values, color=color, alpha=0.25, linewidth=1)
            means = [statistics.fmean(step[key] for step in steps) for steps in zip(*logs, strict=False)]
            axis.plot(range(1, len(means) + 1), means, color=color, linestyle=STYLES[mode], linewidth=2)
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
    axes[1].set_yscale("log")
    num_seeds = len({seed for _, seed in runs})
    lines = [
        Line2D([], [], color=color, linestyle=STYLES[mode], linewidth=2, label=f"{label}, mean of {num_seeds} seeds")
        for mode, (label, _, color) in MODES.items()
    ]
    lines.append(Line2D([], [], color="grey", alpha=0.5, linewidth=1, label="thin: single seeds"))
    figure.legend(handles=lines, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file, dpi=110)


def main() -> None:
    arguments, options = sys.argv[1:], []
    if "--" in arguments:
        cut = arguments.index("--")
        arguments, options = arguments[:cut], arguments[cut + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "grpo-compare")
    parser.add_argument("--write", action="store_true", help="keep table and figure in bench/results")
    args = parser.parse_args(arguments)
    runs = {
        (mode, seed): run(args.out / f"{mode}-{seed}", seed, flags, options)
        for seed in args.seeds
        for mode, (_, flags, _) in MODES.items()
    }
    plot(runs, args.out / "grpo.png")
    print(table(runs))
    if args.write:
        plot(runs, ROOT / "bench" / "results" / "grpo.png")
        text = (
            "# GRPO on the embedded model's dialogues\n\n"
            f"`examples/grpo/compare.py`, options of every run: {settings(options)}.\n{describe()}.\n\n"
            "The engine is in bfloat16, the trainer in float32; KL and extreme tokens (a ratio of probabilities above 2) "
            "are between them, before anything is learnt from a batch.\n\n"
            f"{table(runs)}\n\n![reward and KL](grpo.png)\n"
        )
        print(write_result("grpo.md", text))


if __name__ == "__main__":
    main()
