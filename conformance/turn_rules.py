"""Rules about conversations."""

from __future__ import annotations

import numpy as np

from .findings import NotApplicable, require, require_same_rows
from .rule import Rule
from .server import Server

NUM_TURNS, NEW, MORE = 10, 5, 9


def check_turns(server: Server) -> str:
    """As trainers do it: start = len(previous tokens) - 1, existing[:start] + new."""
    tokens: list[int] = []
    rows = np.empty((0, server.shape.width), np.int32)
    # Positions whose row has not been computed again since it was delivered.
    is_settled = np.empty(0, bool)
    for turn in range(NUM_TURNS):
        prompt = tokens + server.fresh_prompt(MORE)
        start = max(0, len(tokens) - 1)
        answer = server.ask(prompt, NEW, start)
        require(len(rows) >= start, f"turn {turn}: rows {len(rows)} to {start} are missing")
        new = answer.rows()
        rows = np.concatenate([rows[:start], new])
        is_settled = np.concatenate([is_settled[:start], np.ones(len(new), bool)])
        is_settled[answer.cached_tokens : start] = False
        tokens = prompt + answer.output_ids
        require(len(rows) == len(tokens) - 1, f"turn {turn}: {len(rows)} rows for {len(tokens)} tokens")
    whole = server.ask(tokens, 1)
    num_cached = min(whole.cached_tokens, len(rows))
    settled = np.flatnonzero(is_settled[:num_cached])
    if not len(settled):
        raise NotApplicable("the server took nothing of the conversation from a prefix cache")
    full = whole.rows()
    require(len(full) == len(tokens), f"{len(full)} rows for a prompt of {len(tokens)} tokens and one more")
    expected = full[:num_cached].copy()
    # A position that was computed again, in a step of another shape, may have another row.
    expected[~is_settled[:num_cached]] = rows[:num_cached][~is_settled[:num_cached]]
    require_same_rows(f"{NUM_TURNS} turns, stitched", rows[:num_cached], expected)
    others = "" if len(settled) == len(rows) else ", the others were computed again"
    return f"{len(settled)} of {len(rows)} rows{others}"


TURN_RULES = (Rule("turns", "The deltas of ten turns, stitched, are the whole answer at their end.", check_turns),)
