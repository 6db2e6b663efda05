"""Rules about requests that are aborted or retracted. They pause the whole server for a moment."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from .answer import Answer
from .findings import NotApplicable, require, require_same_rows
from .rule import Rule
from .server import JoinedTokens, Refused, Server, parsed

NUM_PROMPT, START = 20, 3
# Tokens that have come when a request is interrupted, and those that it would have; on a fast server more.
NUM_SEEN, LONG, LONGER = 4, 32, 512
ABORT_TRIES, ABORT_EVERY_S = 100, 0.05
RETRACTION_S = 0.05


@contextmanager
def paused(server: Server, mode: str) -> Iterator[None]:
    """
    Raises:
        NotApplicable: the server has no such pause.
    """
    try:
        server.control("/pause_generation", mode=mode)
    except Refused as refusal:
        raise NotApplicable(f"no pause of mode {mode}: {refusal}") from None
    try:
        yield
    finally:
        server.control("/continue_generation")


class Asking:
    """A request under way on a thread of its own."""

    def __init__(self, server: Server, body: dict[str, Any]) -> None:
        self.response: httpx.Response | None = None
        self.error: httpx.HTTPError | None = None
        self._server, self._body = server, body
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.response = self._server.post("/generate", self._body)
        except httpx.HTTPError as error:
            self.error = error

    def is_answered(self, within_s: float) -> bool:
        self._thread.join(within_s)
        return not self._thread.is_alive()

    def result(self) -> httpx.Response:
        self._thread.join()
        if self.error is not None:
            raise self.error
        assert self.response is not None
        return self.response


def check_abort_queued(server: Server) -> str:
    rid = server.fresh_rid()
    with paused(server, "in_place"):
        asking = Asking(server, server.body(server.fresh_prompt(NUM_PROMPT), 8, START, rid=rid))
        # Nothing says that it has arrived, so it is aborted until it has gone.
        for _ in range(ABORT_TRIES):
            if asking.is_answered(ABORT_EVERY_S):
                break
            server.control("/abort_request", rid=rid)
    response = asking.result()
    if not response.is_success:
        return f"answered with HTTP {response.status_code}, without rows"
    answer = Answer(parsed(response.text), server.shape.width)
    if answer.finish_type != "abort" or answer.meta.get("completion_tokens", 0):
        raise NotApplicable("the request was not aborted before its first token")
    require(
        not answer.has_rows,
        f"aborted before its first token it has the key routed_experts: {str(answer.meta.get('routed_experts'))[:40]!r}",
    )
    return "no key"


def check_abort_running(server: Server) -> str:
    rid, prompt = server.fresh_rid(), server.fresh_prompt(NUM_PROMPT)
    cut = interrupted(server, prompt, LONGER, rid, lambda: server.control("/abort_request", rid=rid))
    if cut is None or cut.answer.finish_type != "abort":
        raise NotApplicable("the request ended before its abort")
    answer, num_tokens = cut.answer, cut.answer.count("completion_tokens")
    require(num_tokens == len(cut.tokens), f"{len(cut.tokens)} output_ids, completion_tokens {num_tokens}")
    rows, expected = answer.rows(), answer.num_inputs - START
    require(len(rows) == expected, f"aborted after {num_tokens} tokens: {len(rows)} rows, expected {expected}")
    after = server.ask(prompt + cut.tokens, 1, START)
    num_cached = max(min(after.cached_tokens - START, len(rows)), 0)
    require_same_rows("before the abort and after it", after.rows()[:num_cached], rows[:num_cached], START)
    return f"aborted after {num_tokens} tokens"


def check_retraction(server: Server) -> str:
    prompt = server.warm_prompt(NUM_PROMPT, 1)
    for new in (LONG, LONGER):
        cut = interrupted(server, prompt, new, server.fresh_rid(), lambda: retract(server))
        if cut is not None:
            break
    else:
        raise NotApplicable("the request ended before it could be retracted")
    answer = cut.answer
    if not answer.meta.get("num_retractions", 1):
        raise NotApplicable("the request was not retracted")
    require(answer.finish_type == "length", f"the request ended with {answer.finish_type}, expected length")
    rows, num_expected = answer.rows(), answer.num_inputs - START
    require(len(rows) == num_expected, f"after a retraction: {len(rows)} rows, expected {num_expected}")
    undisturbed = server.ask(prompt, cut.num_seen, START)
    if undisturbed.output_ids != cut.tokens[: cut.num_seen]:
        raise NotApplicable("the server samples other tokens for the same prompt at temperature 0")
    # Later ones follow a prefill where there were decodes, which rounds otherwise.
    before = undisturbed.rows()
    require_same_rows("before the retraction", rows[: len(before)], before, START)
    if "num_retractions" not in answer.meta:
        raise NotApplicable(
            "no row has changed, but the server does not say num_retractions, so that there may have been none"
        )
    return f"{len(before)} rows of before the retraction"


def retract(server: Server) -> None:
    with paused(server, "retract"):
        # A pause takes effect between two steps.
        time.sleep(RETRACTION_S)


@dataclass(frozen=True, eq=False)
class Interrupted:
    """The last event of a stream and all its tokens, of which `num_seen` had come before it was interrupted."""

    answer: Answer
    tokens: list[int]
    num_seen: int


def interrupted(
    server: Server, prompt: list[int], new: int, rid: str, interrupt: Callable[[], None]
) -> Interrupted | None:
    """A stream, in which `interrupt` is called once some tokens have come; None if it had ended by then."""
    joined, num_seen, last = JoinedTokens(), 0, None
    with server.stream(prompt, new, START, rid=rid) as stream:
        for event in stream:
            joined.add(event)
            last = event
            if not num_seen and len(joined.ids) >= NUM_SEEN and event.finish_type is None:
                num_seen = len(joined.ids)
                interrupt()
    return None if last is None or not num_seen else Interrupted(last, joined.ids, num_seen)


INTERRUPTION_RULES = (
    Rule("abort-running", "An aborted request has the rows of its tokens but the last.", check_abort_running),
    Rule("abort-queued", "A request aborted before its first token has no key for routes.", check_abort_queued),
    Rule("retraction", "A retraction changes no row of what was computed before it.", check_retraction),
)
