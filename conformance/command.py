"""The command line. Exit status: 0 no rule is broken, 1 at least one is, 2 nothing could be looked at."""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx

from ..client.answer import http_options
from .catalogue import RULES, rules_named
from .examination import Options, examine
from .findings import CannotRun
from .report import as_json, result_line, rule_line, summary_lines
from .row_shape import KnownSizes
from .rule import Result

EXIT_BROKEN, EXIT_COULD_NOT_RUN = 1, 2
API_KEY_VARIABLE = "WAYBILL_API_KEY"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m waybill.conformance",
        description="Runs the rules of routed experts against a server of sglang's dialect, which nobody else should use "
        "meanwhile: some rules pause it for a moment. Exit status: 0 no rule is broken, 1 at least one is, 2 nothing "
        "could be looked at.",
    )
    parser.add_argument("url", nargs="?", metavar="URL", help="of the server, http://127.0.0.1:30000 for instance")
    parser.add_argument("--api-key", default=os.environ.get(API_KEY_VARIABLE), help=f"or {API_KEY_VARIABLE}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    parser.add_argument("--only", metavar="RULE,...", help="these rules alone")
    parser.add_argument("--list", action="store_true", help="print the rules and leave")
    parser.add_argument("--num-layers", type=int, help="all layers of the model, where the server does not tell")
    parser.add_argument("--top-k", type=int, help="experts of a token, where the server does not tell")
    parser.add_argument("--num-experts", type=int, help="of a layer, where the server's checkpoint does not lie here")
    parser.add_argument("--dp-rank", type=int, help="of several dp ranks the one that is asked (default: the first)")
    parser.add_argument(
        "--tokens", type=int, nargs=2, default=(33, 127), metavar=("FIRST", "END"), help="ids of prompts"
    )
    parser.add_argument("--seed", type=int, help="of the prompts (default: another one each time)")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="of one request (default: 120)")
    return parser


def main(argv: Sequence[str], transport: httpx.BaseTransport | None = None) -> int:
    """Run the command; the exit status. `transport` replaces the network, as for tests."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.list:
        print(*map(rule_line, RULES), sep="\n")
        return 0
    try:
        rules = RULES if args.only is None else rules_named(args.only.split(","))
    except ValueError as error:
        parser.error(str(error))
    if args.url is None:
        parser.error("URL: is missing")
    for name in ("num_layers", "top_k", "num_experts"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if not 0 <= args.tokens[0] < args.tokens[1]:
        parser.error(f"--tokens {args.tokens[0]} {args.tokens[1]}: must be 0 <= FIRST < END")
    seed = random.SystemRandom().getrandbits(32) if args.seed is None else args.seed
    options = Options(
        seed=seed,
        token_range=tuple(args.tokens),
        dp_rank=args.dp_rank,
        sizes=KnownSizes(args.num_layers, args.top_k, args.num_experts),
    )
    print(f"{args.url}, seed {seed}", flush=True)
    try:
        with httpx.Client(**http_options(args.url, args.api_key, args.timeout), transport=transport) as http:
            results = examine(http, rules, options, print_result)
    except (CannotRun, httpx.InvalidURL) as reason:
        print(f"waybill.conformance: could not run: {reason}", file=sys.stderr)
        return EXIT_COULD_NOT_RUN
    return conclude(results, args.url, seed, args.json)


def print_result(result: Result) -> None:
    print(result_line(result), flush=True)


def conclude(results: Sequence[Result], url: str, seed: int, file: Path | None) -> int:
    """Tell what came of all rules; the exit status."""
    print(*summary_lines(results), sep="\n")
    if file is not None:
        file.write_text(json.dumps(as_json(url, seed, results), indent=1) + "\n")
    if any(result.outcome == "failed" for result in results):
        return EXIT_BROKEN
    return 0 if any(result.outcome == "passed" for result in results) else EXIT_COULD_NOT_RUN
