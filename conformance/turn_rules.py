"""Rules about conversations, whose rows come in parts."""

from __future__ import annotations

from typing import Any

import numpy as np

from .answer import Answer
from .findings import NotApplicable, require, require_same_rows
from .rule import Rule
from .server import Refused, Server

NUM_TURNS, NEW, MORE = 10, 5, 9
NUM_AUTO_TURNS, NUM_CHOICES = 4, 2
FIELD = "routed_experts_start_len"


class Stitched:
    """The rows of a conversation from position 0 on: `rows[:start] + new`, turn after turn."""

    def __init__(self, width: int) -> None:
        self.tokens: list[int] = []
        self._rows = np.empty((0, width), np.int32)
        # Positions whose row has not been computed again since it was delivered.
        self._is_settled = np.empty(0, bool)

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    def up_to(self, num_tokens: int) -> Stitched:
        """Its beginning, from which another branch may grow."""
        branch = Stitched(self._rows.shape[1])
        branch.tokens, branch._rows = self.tokens[:num_tokens], self._rows[:num_tokens]
        branch._is_settled = self._is_settled[:num_tokens].copy()
        return branch

    def add(self, case: str, prompt: list[int], start: int, answer: Answer) -> None:
        """
        Raises:
            RuleBroken: there is a gap, or there are too many or too few rows.
        """
        require(self.num_rows >= start, f"{case}: rows {self.num_rows} to {start} are missing")
        new = answer.rows()
        self._is_settled[answer.cached_tokens : start] = False
        self._rows = np.concatenate([self._rows[:start], new])
        self._is_settled = np.concatenate([self._is_settled[:start], np.ones(len(new), bool)])
        self.tokens = prompt + answer.output_ids
        require(self.num_rows == len(self.tokens) - 1, f"{case}: {self.num_rows} rows for {len(self.tokens)} tokens")

    def compare_with_whole(self, case: str, server: Server) -> str:
        """With the rows of one answer to all tokens, as far as they come from the prefix cache; what was compared.

        Raises:
            RuleBroken: they differ.
            NotApplicable: nothing came from there.
        """
        whole = server.ask(self.tokens, 1)
        num_cached = min(whole.cached_tokens, self.num_rows)
        is_settled = self._is_settled[:num_cached]
        if not is_settled.any():
            raise NotApplicable("the server took nothing of the conversation from a prefix cache")
        full = whole.rows()
        require(len(full) == len(self.tokens), f"{len(full)} rows for {len(self.tokens)} tokens and one more")
        # A position that was computed again, in a step of another shape, may have another row.
        expected = np.where(is_settled[:, None], full[:num_cached], self._rows[:num_cached])
        require_same_rows(f"{case}, stitched", self._rows[:num_cached], expected)
        num_settled = int(is_settled.sum())
        others = "" if num_settled == self.num_rows else ", the others were computed again"
        return f"{num_settled} of {self.num_rows} rows{others}"


def check_turns(server: Server) -> str:
    """As trainers do it: start = len(previous tokens) - 1."""
    stitched = Stitched(server.shape.width)
    for turn in range(NUM_TURNS):
        prompt = stitched.tokens + server.fresh_prompt(MORE)
        start = max(0, len(stitched.tokens) - 1)
        stitched.add(f"turn {turn}", prompt, start, server.ask(prompt, NEW, start))
    return stitched.compare_with_whole(f"{NUM_TURNS} turns", server)


def check_session_starts(server: Server) -> str:
    session = server.fresh_rid()
    trunk = Stitched(server.shape.width)
    lengths = []
    for turn in range(NUM_AUTO_TURNS):
        prompt = trunk.tokens + server.fresh_prompt(MORE)
        (answer,) = ask_auto(server, session, prompt)
        if not turn and FIELD not in answer.meta:
            raise NotApplicable(f"the answer does not say {FIELD}")
        start = stated_start(answer)
        require(bool(turn) == bool(start), f"turn {turn}: the rows begin at {start}")
        trunk.add(f"turn {turn}", prompt, start, answer)
        lengths.append(len(trunk.tokens))
    prompt = trunk.tokens[: lengths[1]] + server.fresh_prompt(MORE)
    num_shared = next((i for i, (a, b) in enumerate(zip(prompt, trunk.tokens, strict=False)) if a != b), len(prompt))
    branch = trunk.up_to(num_shared)
    (answer,) = ask_auto(server, session, prompt)
    branch.add("a branch", prompt, stated_start(answer), answer)
    prompt = trunk.tokens + server.fresh_prompt(MORE)
    answers = ask_auto(server, session, prompt, sampling_params={"n": NUM_CHOICES})
    require(len(answers) == NUM_CHOICES, f"n={NUM_CHOICES} has {len(answers)} answers")
    first = trunk.up_to(len(trunk.tokens))
    first.add("choice 0", prompt, stated_start(answers[0]), answers[0])
    for index, answer in enumerate(answers[1:], 1):
        choice = first.up_to(_shared_end(index, answers[0], answer, len(trunk.tokens) - 1))
        choice.add(f"choice {index}", prompt, stated_start(answer), answer)
    branch.compare_with_whole("a branch", server)
    # Choices that have the same tokens have one place in a cache, where the rows of either may stand.
    first.up_to(len(prompt) - 1).compare_with_whole("the prompt of choices", server)
    return trunk.compare_with_whole(f"{NUM_AUTO_TURNS} turns", server) + f", a branch, {NUM_CHOICES} choices"


def _shared_end(index: int, first: Answer, answer: Answer, num_known: int) -> int:
    """Up to where a choice's rows are the caller's: those of before, or, where it says so, of the first choice's prompt."""
    prefix = answer.meta.get("routed_experts_prefix")
    if prefix is None:
        return num_known
    expected = {"choice": 0, "start": stated_start(first), "end": stated_start(answer)}
    require(prefix == expected, f"choice {index}: routed_experts_prefix is {prefix}, expected {expected}")
    require(
        prefix["end"] <= answer.count("prompt_tokens"), f"choice {index}: shares rows of another's answer: {prefix}"
    )
    return int(prefix["end"])


def ask_auto(server: Server, session: str, prompt: list[int], **fields: Any) -> list[Answer]:
    """
    Raises:
        NotApplicable: the server does not know "auto".
    """
    auto: dict[str, Any] = {FIELD: "auto", "session_id": session}
    try:
        return server.answers(prompt, NEW, None, **auto, **fields)
    except Refused as refusal:
        raise NotApplicable(f'{FIELD} "auto" is refused: {refusal}') from None


def stated_start(answer: Answer) -> int:
    """
    Raises:
        RuleBroken: the answer does not say where its rows begin.
    """
    require(FIELD in answer.meta, f"the answer does not say {FIELD}")
    return answer.count(FIELD)


TURN_RULES = (
    Rule("turns", "The deltas of ten turns, stitched, are the whole answer at their end.", check_turns),
    Rule(
        "session-auto",
        'With start "auto" a session\'s answers, stitched where they say, are the whole answer.',
        check_session_starts,
        is_extension=True,
    ),
)
