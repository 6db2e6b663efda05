"""Options of the loop. As a program it checks them and prints the folder of the model to start from."""

from __future__ import annotations

import argparse
from pathlib import Path

TRAINER_RANKS = 2
ROOT = Path(__file__).resolve().parents[2]


EARLY = ROOT / "models" / "early"


def parse_options(arguments: list[str] | None = None, *, may_be_missing: tuple[Path, ...] = ()) -> argparse.Namespace:
    """Options of the command line, or of `arguments`. The model's folder must be there, unless it is a named one."""
    parser = argparse.ArgumentParser(
        prog="examples/grpo/run.sh",
        description="GRPO on arithmetic dialogues: rollouts by the engine, routes replayed, new weights every step.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default=str(EARLY), help="checkpoint to start from")
    parser.add_argument("--out", default=str(ROOT / "out" / "grpo"), help="folder for the log and the plot")
    parser.add_argument("--steps", type=int, default=60, help="of the loop: rollouts, training, new weights")
    parser.add_argument("--dialogues", type=int, default=16, help="different dialogues a step")
    parser.add_argument("--samples", type=int, default=16, help="rollouts of each: one group")
    parser.add_argument("--turns", type=int, default=3, help="of a dialogue")
    parser.add_argument(
        "--mini-steps", type=int, default=2, help="optimizer steps a batch; all but the first are off-policy"
    )
    parser.add_argument("--micro-batch", type=int, default=32, help="rollouts of a forward of one trainer rank")
    parser.add_argument("--lr", type=float, default=1e-4, help="of AdamW, constant")
    parser.add_argument("--clip", type=float, default=0.2, help="of the ratio of probabilities")
    parser.add_argument("--zero", type=int, default=1, choices=(0, 1, 2, 3), help="stage of DeepSpeed's ZeRO")
    parser.add_argument("--seed", type=int, default=0, help="of dialogues and sampling")
    parser.add_argument("--engine-dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--no-replay", action="store_true", help="train on the trainer's own routes")
    parser.add_argument(
        "--in-flight",
        action="store_true",
        help="roll out the next batch while training, with weights that change under it (pause in_place)",
    )
    options = parser.parse_args(arguments)
    for name in ("steps", "dialogues", "turns", "mini_steps", "micro_batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    share = options.mini_steps * TRAINER_RANKS * options.micro_batch
    if options.dialogues * options.samples % share:
        parser.error(
            f"--dialogues times --samples, {options.dialogues * options.samples}: must be a multiple of {share}, "
            f"{TRAINER_RANKS} ranks times --mini-steps times --micro-batch"
        )
    if options.samples < 2:
        parser.error(f"--samples {options.samples}: must be at least 2, a group is compared with itself")
    if Path(options.model) not in may_be_missing and not (Path(options.model) / "config.json").is_file():
        parser.error(f"--model {options.model}: must be a folder with a config.json")
    return options


if __name__ == "__main__":
    # The default is trained on first use.
    print(parse_options(may_be_missing=(EARLY,)).model)
