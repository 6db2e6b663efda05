"""The main job: several multi-turn conversations at once, with the routes of every turn.

Token in, token out: the ids of a conversation only ever grow, a generated token is never tokenised again. Each turn asks
for rows from `routed_experts_start_len = max(0, len(previous tokens) - 1)` on and stitches them to what it has. After the
last turn the whole conversation is asked for once more, in full (`start_len=0`) and without a new token: its rows are
all in the cache, so the stitched deltas must equal this one answer byte for byte. Then the cache is flushed and every
conversation prefilled afresh, to compare with routes that were never cached, chunked or carried over.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from ..engine.config import EngineConfig
from ..engine.control.operations import FlushCache
from ..engine.frontend.chat_template import ChatTemplate, load_chat_template
from ..engine.frontend.engine_connection import EngineStartError
from ..engine.frontend.generate_request import parse_generate_request
from ..engine.frontend.tokenizer_manager import TokenizerManager
from ..engine.ipc.heartbeat import Heartbeat, table_of_this_run
from ..engine.ipc.lifeline import watch_lifeline
from ..engine.routing.wire import stitch
from ..engine.text.tokenizer_file import load_tokenizer
from ..launch.args import RolloutCommand
from ..launch.run_dir import ADDRESSES, ENGINE_CONFIG, ROLLOUT_OPTIONS, read_struct
from ..launch.topology import Addresses
from .dialogues import Turn, make_dialogue
from .report import RolloutReport, TurnReport, print_report, report_json, save_expert_load

START_TIMEOUT_S = 600.0
EXIT_WRONG_ROUTES = 1
EXIT_NO_ENGINE = 2


@dataclass
class Conversation:
    """One conversation: its ids so far, and the routes of all but the last of them."""

    index: int
    turns: list[Turn]
    tokens: list[int] = field(default_factory=list)
    routes: np.ndarray | None = None
    fresh_routes: np.ndarray | None = None
    # Rows that were compared byte for byte with the full answer.
    num_compared: int = 0
    errors: list[str] = field(default_factory=list)
    reports: list[TurnReport] = field(default_factory=list)


class Rollout:
    """Holds the conversations of one run."""

    def __init__(self, manager: TokenizerManager, template: ChatTemplate | None, options: RolloutCommand) -> None:
        self._manager = manager
        self._template = template
        self._options = options
        rng = random.Random(options.seed)
        self.conversations = [
            Conversation(index, make_dialogue(rng, options.turns, held_out=True))
            for index in range(options.conversations)
        ]

    async def run(self, progress: Progress) -> RolloutReport:
        """All conversations, then the checks."""
        task = progress.add_task("turns", total=self._options.conversations * self._options.turns)
        began = time.perf_counter()
        await asyncio.gather(
            *(self._hold(conversation, lambda: progress.advance(task)) for conversation in self.conversations)
        )
        seconds = time.perf_counter() - began
        check = progress.add_task("fresh prefill", total=self._options.conversations)
        flushed = await self._manager.controls.run(FlushCache())
        if not flushed.success:
            raise RuntimeError(flushed.message)
        differing = 0
        for conversation in self.conversations:
            differing += await self._compare_with_fresh_prefill(conversation)
            progress.advance(check)
        return RolloutReport(
            turns=[report for conversation in self.conversations for report in conversation.reports],
            errors=[error for conversation in self.conversations for error in conversation.errors],
            rows_compared=sum(conversation.num_compared for conversation in self.conversations),
            fresh_prefill_rows_different=differing,
            seconds=seconds,
        )

    async def _hold(self, conversation: Conversation, on_turn: Callable[[], None]) -> None:
        for number, turn in enumerate(conversation.turns):
            prompt = conversation.tokens + self._user_tokens(turn, first=number == 0)
            is_last = number == len(conversation.turns) - 1
            await self._take_turn(conversation, number, turn, prompt, is_last)
            on_turn()

    def _user_tokens(self, turn: Turn, *, first: bool) -> list[int]:
        """The ids that a user's turn adds to a conversation."""
        if self._template is None:
            return self._manager.text.encode(turn.user if first else f"\n{turn.user}")
        message = {"role": "user", "content": turn.user}
        return self._manager.text.encode(self._template.render([message]))

    async def _take_turn(
        self, conversation: Conversation, number: int, turn: Turn, prompt: list[int], is_last: bool
    ) -> None:
        start = max(0, len(conversation.tokens) - 1)
        seed = self._options.seed * 1_000_003 + conversation.index * 1_009 + number
        answer = await self._ask(prompt, start, seed, self._options.max_new_tokens)
        meta = answer["meta_info"]
        tokens = prompt + answer["output_ids"]
        routes = self._stitch(conversation, number, answer, start, len(tokens))
        if is_last:
            await self._compare_with_full_answer(conversation, tokens, routes)
        rows = meta["routed_experts_meta"]["rows"] if meta["routed_experts"] is not None else 0
        conversation.reports.append(
            TurnReport(
                conversation=conversation.index,
                turn=number,
                user=turn.user,
                answer=answer["text"],
                expected=turn.answer,
                prompt_tokens=meta["prompt_tokens"],
                completion_tokens=meta["completion_tokens"],
                cached_tokens=meta["cached_tokens"],
                start=start,
                rows=rows,
                routed_bytes=0 if meta["routed_experts"] is None else meta["routed_experts"].nbytes,
            )
        )
        conversation.tokens, conversation.routes = tokens, routes

    def _stitch(
        self, conversation: Conversation, number: int, answer: dict[str, Any], start: int, num_tokens: int
    ) -> np.ndarray | None:
        """The conversation's routes with this turn's delta, or None when anything is missing."""
        meta = answer["meta_info"]
        delta = meta["routed_experts"]
        if delta is None:
            conversation.errors.append(f"turn {number}: {meta['routed_experts_error']}")
            return None
        existing = conversation.routes if number else np.empty((0, *delta.shape[1:]), dtype=delta.dtype)
        if existing is None:
            return None
        try:
            routes = stitch(existing, start, delta)
        except ValueError as error:
            conversation.errors.append(f"turn {number}: {error}")
            return None
        if meta["routed_experts_start_len"] != start or len(routes) != num_tokens - 1:
            conversation.errors.append(
                f"turn {number}: rows reach from {meta['routed_experts_start_len']} to {len(routes)}, "
                f"not {start} to {num_tokens - 1}"
            )
            return None
        return routes

    async def _compare_with_full_answer(
        self, conversation: Conversation, tokens: list[int], routes: np.ndarray | None
    ) -> None:
        """The deltas of all turns, stitched, against one answer for all tokens. Rows that the cache no longer had were
        computed again; of these the fresh prefill speaks, and only the others must be equal."""
        full = await self._ask(tokens, 0, 0, 0)
        meta = full["meta_info"]
        rows = all_but_last(meta["routed_experts"])
        num_cached = meta["cached_tokens"]
        if routes is None or rows is None or rows.shape != routes.shape:
            conversation.errors.append("the full answer does not cover the conversation")
        elif rows[:num_cached].tobytes() != routes[:num_cached].tobytes():
            conversation.errors.append("the stitched deltas differ from the full answer")
        conversation.num_compared = num_cached

    async def _compare_with_fresh_prefill(self, conversation: Conversation) -> int:
        """Rows whose routes differ from those of a prefill of the whole conversation in an empty cache."""
        answer = await self._ask(conversation.tokens, 0, 0, 0)
        fresh = all_but_last(answer["meta_info"]["routed_experts"])
        if conversation.routes is None or fresh is None or fresh.shape != conversation.routes.shape:
            conversation.errors.append("the fresh prefill does not cover the conversation")
            return 0
        conversation.fresh_routes = fresh
        return int((fresh != conversation.routes).any(axis=(1, 2)).sum())

    async def _ask(self, prompt: list[int], start: int, seed: int, max_new_tokens: int) -> dict[str, Any]:
        request = parse_generate_request(
            {
                "input_ids": prompt,
                "sampling_params": {
                    "temperature": self._options.temperature,
                    "max_new_tokens": max_new_tokens,
                    "sampling_seed": seed,
                },
                "return_routed_experts": True,
                "routed_experts_start_len": start,
                "routed_experts_format": "compact",
            }
        )
        answer = await anext(self._manager.generate(request, form="array"))
        assert isinstance(answer, dict)
        return answer


def all_but_last(rows: np.ndarray | None) -> np.ndarray | None:
    """Of a prompt without an answer, the rows that a conversation has: its last token was sampled and never an input."""
    return None if rows is None else rows[:-1]


def explain_differences(
    config: EngineConfig, run_dir: str, dtype: str, conversations: list[Conversation], report: RolloutReport
) -> None:
    """Say what differences from the fresh prefill are. In float32 each must be a near-tie, which the reference proves, in
    a process of its own; in shorter types the order of sums shifts scores by more than that, and they are counted."""
    compared = [c for c in conversations if c.routes is not None and c.fresh_routes is not None]
    num_rows = sum(len(c.routes) for c in compared if c.routes is not None)
    report.verdict = f"{report.fresh_prefill_rows_different} of {num_rows} rows differ"
    if report.fresh_prefill_rows_different == 0:
        return
    if dtype != "float32":
        report.verdict += f" (rounding in {dtype}: sums of other lengths)"
        return
    arrays: dict[str, np.ndarray] = {}
    pairs = [(c.tokens, routes) for c in compared for routes in (c.routes, c.fresh_routes)]
    for index, (tokens, routes) in enumerate(pairs):
        assert routes is not None
        arrays |= {f"tokens_{index}": np.array(tokens), f"routes_{index}": routes}
    with tempfile.TemporaryDirectory(dir=run_dir) as folder:
        file = f"{folder}/routes.npz"
        np.savez(file, allow_pickle=False, **arrays)
        command = [
            sys.executable,
            "-m",
            "waybill.engine.routing.transformers_reference",
            "--model",
            config.model_path,
            "--routes",
            file,
        ]
        check = subprocess.run(command, capture_output=True, text=True)
    report.unexplained = check.returncode != 0
    report.verdict += f"; the reference says: {check.stdout.strip() or check.stderr[-500:]}"


async def hold_rollout(addresses: Addresses, config: EngineConfig, options: RolloutCommand) -> int:
    """Connect, roll out, report, stop the engine; the process' exit status."""
    model_path = config.tokenizer_path or config.model_path
    manager = TokenizerManager(
        config,
        load_tokenizer(model_path),
        leaders=addresses.leaders,
        frontend=addresses.frontend,
        queries=addresses.queries,
    )
    console = Console(stderr=options.json)
    try:
        with console.status(f"loading {config.model_path} on {config.world_size} ranks"):
            await manager.start(START_TIMEOUT_S)
    except EngineStartError as error:
        console.print(f"[red]{error}")
        return EXIT_NO_ENGINE
    rollout = Rollout(manager, load_chat_template(model_path), options)
    with Progress(console=console, transient=True) as progress:
        report = await rollout.run(progress)
    await manager.stop_engine()
    manager.close()
    explain_differences(config, addresses.run_dir, str(manager.facts["dtype"]), rollout.conversations, report)
    routes = [conversation.routes for conversation in rollout.conversations if conversation.routes is not None]
    picture = save_expert_load(routes, manager.facts, options.out) if routes else None
    print_report(console, report, picture)
    if options.json:
        print(report_json(report, config, manager.facts, options), flush=True)
    return EXIT_WRONG_ROUTES if report.is_wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Waybill's rollout frontend; started by rank 0")
    parser.add_argument("--run-dir", required=True)
    run_dir = parser.parse_args().run_dir
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    addresses = read_struct(run_dir, ADDRESSES, Addresses)
    watch_lifeline(addresses.lifeline)
    config = read_struct(run_dir, ENGINE_CONFIG, EngineConfig)
    options = read_struct(run_dir, ROLLOUT_OPTIONS, RolloutCommand)
    Heartbeat(table_of_this_run(), "frontend", config.heartbeat_timeout_s)
    return asyncio.run(hold_rollout(addresses, config, options))
