"""Multi-turn arithmetic dialogues: what the embedded model was trained on, and what the rollout command asks.

    user: start with 12      assistant: 12
    user: add 30             assistant: 42

Every number lies in 0 .. 99. Calculations are split once and for all, by a hash, into those that training may see and
those held out, so that accuracy on held-out dialogues measures arithmetic, not memory. Pure Python.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

MAX_NUMBER = 99
# One calculation in this many is held out.
HELD_OUT_SHARE = 10
# How often each is asked for, where it is possible.
OPERATIONS = {"add": 4, "subtract": 5, "double": 1}


@dataclass(frozen=True)
class Turn:
    """What the user says and the one right answer. `operation` is "start" for the first turn."""

    user: str
    answer: str
    operation: str


def is_held_out(operation: str, value: int, operand: int) -> bool:
    """Whether training must not see this calculation."""
    return zlib.crc32(f"{operation} {value} {operand}".encode()) % HELD_OUT_SHARE == 0


def calculations(value: int) -> list[tuple[str, int, int]]:
    """Every (operation, operand, result) that starts at `value` and stays in range."""
    found = [("add", operand, value + operand) for operand in range(1, MAX_NUMBER - value + 1)]
    found += [("subtract", operand, value - operand) for operand in range(1, value + 1)]
    if 0 < 2 * value <= MAX_NUMBER:
        found.append(("double", 0, 2 * value))
    return found


def make_dialogue(rng: random.Random, num_turns: int, *, held_out: bool) -> list[Turn]:
    """A dialogue of `num_turns` >= 1 turns whose calculations are all held out, or all not."""
    value = rng.randint(0, MAX_NUMBER)
    turns = [Turn(f"start with {value}", str(value), "start")]
    while len(turns) < num_turns:
        options = [c for c in calculations(value) if is_held_out(c[0], value, c[1]) == held_out]
        if not options:
            # A value without such a calculation: begin anew within the dialogue.
            value = rng.randint(0, MAX_NUMBER)
            turns.append(Turn(f"start with {value}", str(value), "start"))
            continue
        names = sorted({c[0] for c in options})
        operation = rng.choices(names, [OPERATIONS[name] for name in names])[0]
        _, operand, value = rng.choice([c for c in options if c[0] == operation])
        user = operation if operation == "double" else f"{operation} {operand}"
        turns.append(Turn(user, str(value), operation))
    return turns
