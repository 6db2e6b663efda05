"""Command lines, checked before anything is started."""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec

from ..engine.config import (
    ATTENTION_BACKENDS,
    DTYPES,
    EXPERTS_BACKENDS,
    MOE_DISPATCHERS,
    MOE_SPLITS,
    OUTPUT_PROCESSORS,
    EngineConfig,
)
from .node_options import NodeOptions, node_options, node_parser, run_secret
from .serve_options import ServeCommand, add_serve_options, serve_command
from .topology import Layout

# Fields of the engine's configuration that only a server's command line has.
SERVE_ENGINE_OPTIONS = {
    "max_waiting_requests": "max_waiting_requests",
    "claim_ttl_s": "claim_ttl",
    "claim_budget_bytes": "claim_budget_bytes",
    "weight_version": "weight_version",
    "weight_sync_timeout_s": "weight_sync_timeout",
    "weight_sync_groups": "weight_sync_groups",
    "weight_sync_hosts": "weight_sync_hosts",
}
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
        epilog="torchrun.sh [rollout | serve] --help lists the options of a command",
    )
    # From the agent alone.
    parser.add_argument("--run-dir", default="", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("engine")
    rollout = commands.add_parser(
        "rollout",
        parents=[node_parser()],
        usage="torchrun.sh [rollout] [options]",
        help="multi-turn conversations with their routes",
        description="Hold conversations with a model and show the routes of every turn.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_rollout_options(rollout)
    add_engine_options(rollout)
    serve = commands.add_parser(
        "serve",
        parents=[node_parser()],
        usage="torchrun.sh serve [options]",
        help="the HTTP service",
        description="Serve a model over HTTP: the native /generate API and OpenAI's.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_serve_options(serve)
    add_serve_engine_options(serve)
    add_engine_options(serve)
    # A line per request.
    serve.set_defaults(log_level="info")
    options = parser.parse_args(argv)
    if options.command == "engine":
        return WorkerCommand(run_dir=options.run_dir)
    try:
        check_model(options.model, options.tp)
        if options.dp < 1:
            raise ValueError(f"--dp {options.dp}: must be at least 1")
        nodes = node_options(options)
        run_secret()
        if options.command == "serve":
            config = engine_config(options, routing=options.enable_return_routed_experts)
            command = WorkerCommand(nodes=nodes, run_dir=options.run_dir, config=config, serve=serve_command(options))
        else:
            config = engine_config(options, routing=True)
            rollout_options = rollout_command(options)
            command = WorkerCommand(nodes=nodes, run_dir=options.run_dir, config=config, rollout=rollout_options)
        Layout.of(config, nodes.nnodes)
        return command
    except ValueError as error:
        (serve if options.command == "serve" else rollout).error(str(error))


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


def add_rollout_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--conversations", type=int, default=4, help="conversations held at once")
    parser.add_argument("--turns", type=int, default=4, help="turns of each")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest answer, in tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0, help="of the dialogues and of sampling")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line of stdout")
    parser.add_argument("--out", default="out", help="folder for the picture of the expert load")


def add_serve_engine_options(parser: argparse.ArgumentParser) -> None:
    """Of the engine, on a server's command line alone."""
    parser.add_argument("--max-waiting-requests", type=int, default=4096, help="more than these are refused with 503")
    parser.add_argument("--claim-ttl", type=float, default=600.0, help="seconds that routes by reference are kept")
    parser.add_argument("--claim-budget-bytes", type=int, default=1 << 30, help="bytes of routes by reference kept")
    parser.add_argument("--weight-version", default="default", help="what the weights are called until an update")
    parser.add_argument(
        "--weight-sync-timeout",
        type=float,
        default=300.0,
        help="seconds for a group to come together, a transfer to go on, an update to bring its next tensor",
    )
    parser.add_argument(
        "--weight-sync-groups", type=int, default=8, help="update groups at once, joined or still to come together"
    )
    parser.add_argument(
        "--weight-sync-hosts",
        type=lambda text: tuple(text.split(",")),
        default=None,
        metavar="HOST,...",
        help="names, addresses and networks that update groups may be joined at; anywhere if not given",
    )


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    defaults = EngineConfig(model_path="")
    parser.add_argument("--model", default=str(EMBEDDED_MODEL), help="checkpoint folder in Hugging Face format")
    parser.add_argument("--tp", type=int, default=2, help="ranks that share each attention layer (tensor parallel)")
    parser.add_argument("--dp", type=int, default=1, help="groups of such ranks, each with requests of its own")
    parser.add_argument("--device", default=defaults.device, help="auto, cpu or cuda")
    parser.add_argument("--dtype", default=defaults.dtype, choices=DTYPES)
    parser.add_argument("--moe-split", default=defaults.moe_split, choices=MOE_SPLITS, help="whole experts, or slices")
    parser.add_argument(
        "--moe-dispatcher",
        default=defaults.moe_dispatcher,
        choices=MOE_DISPATCHERS,
        help="how tokens reach their experts with --dp",
    )
    parser.add_argument("--attention-backend", default=defaults.attention_backend, choices=ATTENTION_BACKENDS)
    parser.add_argument("--experts-backend", default=defaults.experts_backend, choices=EXPERTS_BACKENDS)
    parser.add_argument(
        "--context-length", type=int, default=None, help="longest request; the checkpoint's if not given"
    )
    parser.add_argument("--page-size", type=int, default=defaults.page_size, help="tokens of a KV page")
    parser.add_argument(
        "--kv-cache-tokens", type=int, default=None, help="size of the KV pool; from memory if not given"
    )
    parser.add_argument("--max-running-requests", type=int, default=defaults.max_running_requests, help="at once")
    parser.add_argument("--chunked-prefill-size", type=int, default=defaults.chunked_prefill_size, help="-1: no chunks")
    parser.add_argument("--disable-prefix-cache", action="store_true", help="compute every prompt anew")
    parser.add_argument(
        "--overlap-depth",
        type=int,
        default=defaults.overlap_depth,
        choices=(0, 1),
        help="steps in flight while one is planned",
    )
    parser.add_argument(
        "--routing-ring-slots", type=int, default=defaults.routing_ring_slots, help="steps of routes that may wait"
    )
    parser.add_argument(
        "--output-processors",
        default=defaults.output_processors,
        choices=OUTPUT_PROCESSORS,
        help="one for the engine, or one on each node",
    )
    parser.add_argument(
        "--heartbeat-timeout",
        type=float,
        default=defaults.heartbeat_timeout_s,
        help="seconds after which a stopped process is killed and the run ends",
    )
    parser.add_argument(
        "--log-level", default=defaults.log_level, choices=("debug", "info", "warning", "error"), help="what is logged"
    )


def engine_config(options: argparse.Namespace, *, routing: bool) -> EngineConfig:
    return EngineConfig(
        model_path=options.model,
        tp_size=options.tp,
        dp_size=options.dp,
        device=options.device,
        dtype=options.dtype,
        moe_split=options.moe_split,
        moe_dispatcher=options.moe_dispatcher,
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
        output_processors=options.output_processors,
        heartbeat_timeout_s=options.heartbeat_timeout,
        log_level=options.log_level,
        enable_return_routed_experts=routing,
        **{name: getattr(options, flag) for name, flag in SERVE_ENGINE_OPTIONS.items() if hasattr(options, flag)},
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
