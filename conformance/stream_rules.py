"""Rules about streams, and about several choices."""

from __future__ import annotations

import numpy as np

from .answer import Answer
from .findings import NotApplicable, require, require_same_rows
from .rule import Rule
from .server import JoinedTokens, Refused, Server

NUM_PROMPT, NEW, START = 20, 6, 3
NUM_CHOICES = 3
OTHER_TOKENS = "the stream has other tokens than the whole answer at temperature 0"


def check_stream(server: Server) -> str:
    prompt = server.warm_prompt(NUM_PROMPT, NEW)
    whole = server.ask(prompt, NEW, START)
    events, tokens = _read(server, prompt)
    if tokens != whole.output_ids:
        raise NotApplicable(OTHER_TOKENS)
    require_same_rows("the last event", events[-1].rows(), whole.rows(), START)
    earlier = [event for event in events[:-1] if event.has_rows]
    for event in earlier:
        rows = event.rows()
        require_same_rows("an earlier event", rows, whole.rows()[: len(rows)], START)
    return f"{len(events)} events" + (f", {len(earlier)} with the rows so far" if earlier else "")


def check_stream_deltas(server: Server) -> str:
    prompt = server.warm_prompt(NUM_PROMPT, NEW)
    whole = server.ask(prompt, NEW, START)
    try:
        events, tokens = _read(server, prompt, stream_routed_experts=True)
    except Refused as refusal:
        raise NotApplicable(f"stream_routed_experts is refused: {refusal}") from None
    parts = [event.rows() for event in events if event.has_rows]
    if len(events) > 1 and len(parts) == 1 and events[-1].has_rows and len(parts[0]) == len(whole.rows()):
        raise NotApplicable("stream_routed_experts is ignored")
    if tokens != whole.output_ids:
        raise NotApplicable(OTHER_TOKENS)
    require(bool(parts), "no event has rows")
    require_same_rows("events joined", np.concatenate(parts), whole.rows(), START)
    return f"{len(parts)} events"


def _read(server: Server, prompt: list[int], **fields: bool) -> tuple[list[Answer], list[int]]:
    """All events, and their tokens."""
    joined, events = JoinedTokens(), []
    with server.stream(prompt, NEW, START, **fields) as stream:
        for event in stream:
            joined.add(event)
            events.append(event)
    require(bool(events), "the stream has no events")
    return events, joined.ids


def check_choices(server: Server) -> str:
    prompt = server.warm_prompt(NUM_PROMPT, NEW)
    alone = server.ask(prompt, NEW, START)
    try:
        choices = server.answers(prompt, NEW, START, sampling_params={"n": NUM_CHOICES})
    except Refused as refusal:
        raise NotApplicable(f"n={NUM_CHOICES} is refused: {refusal}") from None
    require(len(choices) == NUM_CHOICES, f"n={NUM_CHOICES} has {len(choices)} answers")
    for index, choice in enumerate(choices):
        require(choice.has_rows, f"choice {index} has no rows")
        rows, expected = choice.rows(), choice.num_inputs - START
        require(len(rows) == expected, f"choice {index}: {len(rows)} rows, expected {expected}")
        # What is not cached is computed for several at once, in steps of another shape.
        num_same = max(min(choice.cached_tokens, alone.cached_tokens) - START, 0)
        require_same_rows(f"choice {index}", rows[:num_same], alone.rows()[:num_same], START)
    return f"{NUM_CHOICES} choices"


STREAM_RULES = (
    Rule("stream", "The last event of a stream has the rows of the whole answer.", check_stream),
    Rule(
        "stream-deltas",
        "With stream_routed_experts the rows of all events, joined, are those of the whole answer.",
        check_stream_deltas,
        is_extension=True,
    ),
    Rule("choices", "With n > 1 every choice has its rows.", check_choices),
)
