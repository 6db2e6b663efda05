"""A server is examined: its rows' shape is found out, then rule after rule is checked."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from .answer import MalformedAnswer
from .findings import CannotRun, NotApplicable, RuleBroken
from .row_shape import KnownSizes, RowShape, sizes_of_checkpoint, sizes_of_envelope
from .rule import Outcome, Result, Rule
from .server import Refused, Server

PROBE_LENGTHS = (6, 11)
NOTHING_KNOWN = KnownSizes()


@dataclass(frozen=True)
class Options:
    """What the caller says of the server; prompts are of the ids `token_range`, half-open."""

    seed: int
    token_range: tuple[int, int] = (33, 127)
    dp_rank: int | None = None
    sizes: KnownSizes = NOTHING_KNOWN


def examine(
    http: httpx.Client, rules: Sequence[Rule], options: Options, on_result: Callable[[Result], None]
) -> list[Result]:
    """What comes of each rule; `on_result` is told at once.

    Raises:
        CannotRun: there is no server, or none that returns routes.
    """
    dp_rank = options.dp_rank if options.dp_rank is not None else _default_rank(http)

    def server_of(shape: RowShape, seed: int) -> Server:
        return Server(http, shape, seed=seed, token_range=options.token_range, dp_rank=dp_rank)

    shape = _find_shape(server_of(RowShape(1), options.seed - 1), options.sizes)
    results = []
    for rule in rules:
        # Each rule has prompts of its own, also where others are left out.
        own = random.Random(f"{options.seed} {rule.name}").getrandbits(64)
        results.append(run_rule(rule, server_of(shape, own)))
        on_result(results[-1])
    return results


def run_rule(rule: Rule, server: Server) -> Result:
    began = time.perf_counter()

    def result(outcome: Outcome, detail: object) -> Result:
        return Result(rule, outcome, str(detail), time.perf_counter() - began)

    try:
        return result("passed", rule.check(server))
    except NotApplicable as reason:
        return result("not applicable", reason)
    except (RuleBroken, MalformedAnswer, Refused) as fault:
        return result("failed", fault)
    except httpx.HTTPError as error:
        return result("failed", f"{type(error).__name__}: {error}")


def _default_rank(http: httpx.Client) -> int | None:
    """The first of several dp ranks, so that repeated prompts meet one prefix cache; None where there is one."""
    for path in ("/server_info", "/get_server_info"):
        try:
            response = http.get(path)
        except httpx.HTTPError as error:
            raise CannotRun(f"no server: {type(error).__name__}: {error}") from None
        if response.status_code in (401, 403):
            raise CannotRun(f"HTTP {response.status_code}: {response.text[:200]}")
        if response.is_success:
            info = _object(response)
            return 0 if info.get("dp_size", 1) > 1 else None
    return None


def _object(response: httpx.Response) -> dict[str, Any]:
    """A JSON object; {} where the body is none."""
    try:
        content = response.json()
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _find_shape(server: Server, told: KnownSizes) -> RowShape:
    """Two answers of different lengths say how wide a row is, also where a server's count of rows is wrong."""
    try:
        lengths = [len(server.ask(server.fresh_prompt(num), 2).raw_bytes()) for num in PROBE_LENGTHS]
        sizes = told.or_else(_sizes_of(server))
    except (Refused, MalformedAnswer) as fault:
        raise CannotRun(f"no routes: {fault}") from None
    except httpx.HTTPError as error:
        raise CannotRun(f"no server: {type(error).__name__}: {error}") from None
    width, remainder = divmod(lengths[1] - lengths[0], 4 * (PROBE_LENGTHS[1] - PROBE_LENGTHS[0]))
    if width <= 0 or remainder:
        raise CannotRun(f"prompts of {PROBE_LENGTHS} tokens have {lengths} bytes of rows: no rows of one width")
    try:
        return sizes.shape(width)
    except ValueError as error:
        raise CannotRun(str(error)) from None


def _sizes_of(server: Server) -> KnownSizes:
    """What the server's envelope and its checkpoint, if it lies here, say."""
    model_path = None
    for path in ("/model_info", "/get_model_info"):
        model_path = model_path or _object(server.get(path)).get("model_path")
    checkpoint = sizes_of_checkpoint(model_path) if isinstance(model_path, str) else KnownSizes()
    try:
        meta = server.ask(server.fresh_prompt(4), 2, routed_experts_format="compact").meta
    except Refused:
        return checkpoint
    return sizes_of_envelope(meta).or_else(checkpoint)
