"""Command lines, checked before anything is started."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypeAlias

import msgspec

from ..engine.config import EngineConfig
from ..engine.text.tokenizer_file import NEEDS_CODE, why_no_tokenizer
from .engine_options import HelpFormatter, add_engine_options, engine_config
from .node_options import NodeOptions, check_partners, node_options, node_parser, run_secret
from .serve_options import ServeCommand, add_serve_options, serve_command
from .topology import Layout

EMBEDDED_MODEL = Path(__file__).resolve().parents[1] / "examples" / "tiny_moe" / "checkpoint"
# Of every command that starts an engine.
DEFAULTS = {"model_path": str(EMBEDDED_MODEL), "tp_size": 2}
# argparse has no public name for it.
Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


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
    """What a node was told to do. Without `config` a program called, and the configuration lies in `run_dir`, the node's
    folder of the run."""

    nodes: NodeOptions = NodeOptions()
    run_dir: str = ""
    config: EngineConfig | None = None
    rollout: RolloutCommand | None = None
    serve: ServeCommand | None = None

    @property
    def has_frontend(self) -> bool:
        return self.rollout is not None or self.serve is not None


def parse_worker_args(argv: list[str]) -> WorkerCommand:
    """Parse a rank's command line; a mistake ends the process with status 2 and a message that names the option."""
    parser = argparse.ArgumentParser(
        prog="torchrun.sh",
        description="Waybill: MoE rollouts with their routes",
        epilog="torchrun.sh [rollout | serve | route | encode] --help lists the options of a command",
    )
    # From the agent alone.
    parser.add_argument("--run-dir", default="", help=argparse.SUPPRESS)
    subparsers = parser.add_subparsers(dest="command", required=True)
    subparsers.add_parser("engine")
    commands = {"rollout": add_rollout(subparsers), "serve": add_serve(subparsers)}
    options = parser.parse_args(argv)
    if options.command == "engine":
        return WorkerCommand(run_dir=options.run_dir)
    try:
        return worker_command(options)
    except ValueError as error:
        commands[options.command].error(str(error))


def add_rollout(subparsers: Subparsers) -> argparse.ArgumentParser:
    rollout = subparsers.add_parser(
        "rollout",
        parents=[node_parser()],
        usage="torchrun.sh [rollout] [options]",
        help="multi-turn conversations with their routes",
        description="Hold conversations with a model and show the routes of every turn.",
        formatter_class=HelpFormatter,
    )
    add_rollout_options(rollout)
    # Routes are what it is about.
    add_engine_options(rollout, **DEFAULTS, enable_return_routed_experts=True)
    return rollout


def add_serve(subparsers: Subparsers) -> argparse.ArgumentParser:
    serve = subparsers.add_parser(
        "serve",
        parents=[node_parser()],
        usage="torchrun.sh serve [options]",
        help="the HTTP service",
        description="Serve a model over HTTP: the native /generate API and OpenAI's.",
        formatter_class=HelpFormatter,
    )
    add_serve_options(serve)
    # A line per request.
    add_engine_options(serve, **DEFAULTS, log_level="info")
    return serve


def worker_command(options: argparse.Namespace) -> WorkerCommand:
    """Of `rollout` or `serve`.

    Raises:
        ValueError: an option is wrong by itself, or does not go with the others.
    """
    check_model(options.model_path, options.tp_size)
    check_tokenizer(options.tokenizer_path)
    if options.dp_size < 1:
        raise ValueError(f"--dp {options.dp_size}: must be at least 1")
    nodes = node_options(options)
    run_secret()
    config = engine_config(options)
    check_partners(config, nodes.nnodes)
    if options.command == "serve":
        command = WorkerCommand(nodes=nodes, run_dir=options.run_dir, config=config, serve=serve_command(options))
    else:
        rollout = rollout_command(options)
        command = WorkerCommand(nodes=nodes, run_dir=options.run_dir, config=config, rollout=rollout)
    Layout.of(config, nodes.nnodes)
    return command


def check_model(path: str, tp: int) -> None:
    """What can be said of a checkpoint before any rank starts.

    Raises:
        ValueError: the folder holds none, or its heads cannot be shared by so many ranks.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"--model {path}: must be a folder with a config.json (Hugging Face format)")
    num_heads = msgspec.json.decode(file.read_bytes()).get("num_attention_heads")
    if tp < 1 or (num_heads is not None and num_heads % tp):
        raise ValueError(f"--tp {tp}: must be at least 1 and divide the model's {num_heads} attention heads")


def check_tokenizer(path: str | None) -> None:
    """A checkpoint may have no tokenizer, and then there is no text; where one was named, it has to be there.

    Raises:
        ValueError: it is not.
    """
    if path is not None and not (Path(path) / "tokenizer.json").is_file():
        reason = "; its tokenizer is code, which is never run" if why_no_tokenizer(path) == NEEDS_CODE else ""
        raise ValueError(f"--tokenizer-path {path}: must be a folder with a tokenizer.json{reason}")


def add_rollout_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--conversations", type=int, default=4, help="conversations held at once")
    parser.add_argument("--turns", type=int, default=4, help="turns of each")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest answer, in tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0, help="of the dialogues and of sampling")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line of stdout")
    parser.add_argument("--out", default="out", help="folder for the picture of the expert load")


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
