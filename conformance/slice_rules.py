"""Rules about `routed_experts_start_len`."""

from __future__ import annotations

from typing import Any

import httpx

from .findings import RuleBroken, require, require_comparable, require_same_rows
from .rule import Rule
from .server import Refused, Server, checked, parsed

FIELD = "routed_experts_start_len"
NUM_PROMPT, NEW = 24, 5


def check_default_start(server: Server) -> str:
    prompt = server.warm_prompt(NUM_PROMPT, NEW)
    default, zero = server.ask(prompt, NEW, None), server.ask(prompt, NEW, 0)
    require_comparable(default, zero)
    require(default.raw_bytes() == zero.raw_bytes(), f"the answer without {FIELD} is not that with 0")
    return f"{len(zero.rows())} rows"


def check_slice(server: Server) -> str:
    prompt = server.warm_prompt(NUM_PROMPT, NEW)
    whole = server.ask(prompt, NEW)
    starts = (1, 7, NUM_PROMPT // 2, NUM_PROMPT - 1)
    for start in starts:
        part = server.ask(prompt, NEW, start)
        require_comparable(whole, part)
        require_same_rows(f"start {start}", part.rows(), whole.rows()[start:], start)
    return f"starts {', '.join(map(str, starts))}"


def check_start_at_end(server: Server) -> str:
    prompt = server.warm_prompt(NUM_PROMPT, NEW)
    whole, part = server.ask(prompt, NEW), server.ask(prompt, NEW, NUM_PROMPT)
    require_comparable(whole, part)
    require_same_rows(f"start {NUM_PROMPT}", part.rows(), whole.rows()[NUM_PROMPT:], NUM_PROMPT)
    empty = server.ask(prompt, 1, NUM_PROMPT)
    require(empty.raw_bytes() == b"", "one new token has rows from the end of the prompt on, there are none")
    return f"start {NUM_PROMPT}, {NEW} and 1 new tokens"


def check_bounds(server: Server) -> str:
    starts = (-1, NUM_PROMPT + 1, NUM_PROMPT + 100_000)
    for start in starts:
        for stream in (False, True):
            prompt = server.fresh_prompt(NUM_PROMPT)
            _require_refusal(server, server.body(prompt, NEW, start, stream=stream), f"start {start}, stream {stream}")
            after = _served(server, prompt, start)
            require(after < NUM_PROMPT // 2, f"start {start}: {after} tokens were prefilled before it was refused")
    return f"starts {', '.join(map(str, starts))}, whole and streamed"


def _served(server: Server, prompt: list[int], start: int) -> int:
    """Cached tokens of a good request behind a refused one."""
    try:
        return server.ask(prompt, NEW).cached_tokens
    except (Refused, httpx.HTTPError) as error:
        raise RuleBroken(f"start {start}: a good request fails afterwards: {error}") from None


def _require_refusal(server: Server, body: dict[str, Any], case: str) -> None:
    """With a status of its own, or, in a stream, in its first event."""
    response = server.post("/generate", body)
    status, text = response.status_code, response.text
    if response.is_success and body["stream"]:
        status, text = in_band_refusal(text)
    require(400 <= status < 500, f"{case}: status {status}, must be 4xx")
    require(FIELD in text, f"{case}: the refusal does not name {FIELD}: {text[:200]}")


def in_band_refusal(text: str) -> tuple[int, str]:
    """Status and text of the first event of a stream; (200, ...) where it refuses nothing."""
    line = next((line for line in text.splitlines() if line.startswith("data:")), "")
    event = checked(parsed(line.removeprefix("data:")))
    if "error" in event:
        return 400, line
    reason = (event.get("meta_info") or {}).get("finish_reason") or {}
    return (reason.get("status_code") or 400) if reason.get("type") == "abort" else 200, line


SLICE_RULES = (
    Rule("default-start", f"{FIELD} left out is 0.", check_default_start),
    Rule("slice", "The rows from a start are the tail of the whole, byte for byte.", check_slice),
    Rule("start-at-end", "A start of prompt_tokens is legal: the rows of the answer's own tokens.", check_start_at_end),
    Rule("bounds", "A start outside 0 .. prompt_tokens is refused by name before any prefill.", check_bounds),
)
