"""Command lines, checked before anything is started."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec

from ..engine.config import ATTENTION_BACKENDS, DTYPES, EXPERTS_BACKENDS, MOE_SPLITS, EngineConfig

EMBEDDED_MODEL = Path(__file__).resolve().parents[1] / "examples" / "tiny_moe" / "checkpoint"


class RolloutCommand(msgspec.Struct, frozen=True, kw_only=True):
    """Options of the main job: conversations at once, turns each, and what to leave behind."""

    conversations: int
    turns: int
    max_new_tokens: int
    temperature: float
    seed: int
    json: bool
    out: str

    def __post_init__(self) -> None:
        for name in ("conversations", "turns", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"--temperature {self.temperature}: must be at least 0")


class WorkerCommand(msgspec.Struct, frozen=True):
    """What a rank was told to do. With `run_dir` a program called, and the configuration lies in there."""

    run_dir: str | None = None
    config: EngineConfig | None = None
    rollout: RolloutCommand | None = None


def parse_worker_args(argv: list[str]) -> WorkerCommand:
    """Parse a rank's command line; a mistake ends the process with status 2 and a message that names the option."""
    parser = argparse.ArgumentParser(prog="torchrun.sh", description="Waybill: MoE rollouts with their routes")
    commands = parser.add_subparsers(dest="command", required=True)
    engine = commands.add_parser("engine", help="serve a calling program (started by waybill.Engine)")
    engine.add_argument("--run-dir", required=True)
    rollout = commands.add_parser(
        "rollout",
        help="multi-turn conversations with their routes",
        description="Hold conversations with a model and show the routes of every turn.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_rollout_options(rollout)
    add_engine_options(rollout)
    options = parser.parse_args(argv)
    if options.command == "engine":
        return WorkerCommand(run_dir=options.run_dir)
    try:
        return WorkerCommand(config=engine_config(options), rollout=rollout_command(options))
    except ValueError as error:
        rollout.error(str(error))


def add_rollout_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--conversations", type=int, default=4, help="conversations held at once")
    parser.add_argument("--turns", type=int, default=4, help="turns of each")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest answer, in tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0, help="of the dialogues and of sampling")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line of stdout")
    parser.add_argument("--out", default="out", help="folder for the picture of the expert load")


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    defaults = EngineConfig(model_path="")
    parser.add_argument("--model", default=str(EMBEDDED_MODEL), help="checkpoint folder in Hugging Face format")
    parser.add_argument("--tp", type=int, default=2, help="tensor-parallel ranks")
    parser.add_argument("--device", default=defaults.device, help="auto, cpu or cuda")
    parser.add_argument("--dtype", default=defaults.dtype, choices=DTYPES)
    parser.add_argument("--moe-split", default=defaults.moe_split, choices=MOE_SPLITS, help="whole experts, or slices")
    parser.add_argument("--attention-backend", default=defaults.attention_backend, choices=ATTENTION_BACKENDS)
    parser.add_argument("--experts-backend", default=defaults.experts_backend, choices=EXPERTS_BACKENDS)
    parser.add_argument(
        "--context-length", type=int, default=None, help="longest request; the checkpoint's if not given"
    )
    parser.add_argument("--page-size", type=int, default=defaults.page_size, help="tokens of a KV page")
    parser.add_argument(
        "--kv-cache-tokens", type=int, default=None, help="size of the KV pool; from memory if not given"
    )
    parser.add_argument("--max-running-requests", type=int, default=defaults.max_running_requests)
    parser.add_argument("--chunked-prefill-size", type=int, default=defaults.chunked_prefill_size, help="-1: no chunks")
    parser.add_argument("--disable-prefix-cache", action="store_true")
    parser.add_argument("--overlap-depth", type=int, default=defaults.overlap_depth, choices=(0, 1))
    parser.add_argument("--routing-ring-slots", type=int, default=defaults.routing_ring_slots)
    parser.add_argument("--log-level", default=defaults.log_level, choices=("debug", "info", "warning", "error"))


def engine_config(options: argparse.Namespace) -> EngineConfig:
    return EngineConfig(
        model_path=options.model,
        tp_size=options.tp,
        device=options.device,
        dtype=options.dtype,
        moe_split=options.moe_split,
        attention_backend=options.attention_backend,
        experts_backend=options.experts_backend,
        context_length=options.context_length,
        page_size=options.page_size,
        kv_cache_tokens=options.kv_cache_tokens,
        max_running_requests=options.max_running_requests,
        chunked_prefill_size=options.chunked_prefill_size,
        enable_prefix_cache=not options.disable_prefix_cache,
        overlap_depth=options.overlap_depth,
        routing_ring_slots=options.routing_ring_slots,
        log_level=options.log_level,
        enable_return_routed_experts=True,
    )


def rollout_command(options: argparse.Namespace) -> RolloutCommand:
    return RolloutCommand(
        conversations=options.conversations,
        turns=options.turns,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
        json=options.json,
        out=options.out,
    )


def main() -> None:
    """Check a command line and say what is wrong with it, or nothing."""
    parse_worker_args(sys.argv[1:])


if __name__ == "__main__":
    main()
