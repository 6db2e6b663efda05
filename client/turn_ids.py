"""Ids of a chat's next turn, built of what was sampled: token in, token out, for trainers.

What a template writes of an answer may be other tokens than those that were sampled: it strips spaces, writes a call's
arguments anew, or a text has several ways to be written. A trainer that tokenises the history again would train on tokens
that the model never chose. So the next prompt is the last prompt, the ids as they were sampled, and what the template adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class NextTurn:
    """`input_ids` of the next turn begin with all ids of the last one. `drift` is the first position at which the template
    would have written another token than was sampled; None where it writes the same."""

    input_ids: list[int]
    drift: int | None


def next_turn_ids(
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    answered_ids: Sequence[int],
    asked_ids: Sequence[int],
    *,
    is_cut: bool,
) -> NextTurn:
    """
    Args:
        prompt_ids, output_ids: of the turn that was answered (`prompt_token_ids` and `token_ids` of a chat with
            `return_token_ids`).
        answered_ids: the messages up to that answer as `/tokenize` writes them, with `add_generation_prompt` false.
        asked_ids: likewise with the new messages, and `add_generation_prompt` true.
        is_cut: no token of its own ended the answer: its `finish_reason` is `length`, or a stop string was found.

    Raises:
        ValueError: the template writes the history in another way once more messages follow, so that what it adds cannot be
            told; or it writes the answer in other tokens, and the answer was cut, so that its end there cannot be told.
    """
    if not output_ids:
        raise ValueError("output_ids: must have at least one token")
    known = [*prompt_ids, *output_ids]
    if list(asked_ids[: len(answered_ids)]) != list(answered_ids):
        raise ValueError("the template writes the answered turn in another way when messages follow it")
    drift = next((i for i, (a, b) in enumerate(zip(known, answered_ids, strict=False)) if a != b), None)
    if drift is None and len(answered_ids) < len(known):
        drift = len(answered_ids)
    if drift is None:
        return NextTurn([*known, *asked_ids[len(known) :]], None)
    if is_cut:
        raise ValueError(
            f"the template writes other tokens from {drift} on, and the answer was cut: its end cannot be told"
        )
    # The answer ends with the token that ended it, which the template writes as well; what follows is the template's.
    ends = [i for i, token in enumerate(answered_ids) if token == output_ids[-1] and i >= drift]
    if not ends:
        raise ValueError(f"the template writes other tokens from {drift} on, and none that ends the answer as it ended")
    return NextTurn([*known, *asked_ids[ends[-1] + 1 :]], drift)
