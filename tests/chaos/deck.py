"""Which fault a seed means. Fifty trials in a row hold every kind in a fixed number, in an order of their own."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .service import Shape

# For servers alone.
HTTP_KINDS = {
    "fuzzed bodies": 3,
    "large bodies": 6,
    "unfinished requests": 5,
    "connection storm": 2,
    "unread streams": 2,
}
# For servers and programs.
SHARED_KINDS = {
    "claim frames": 4,
    "extreme sampling": 3,
    "leaving clients": 2,
    "flood of aborts": 2,
    "random names": 1,
    "torn updates": 3,
    "pauses": 1,
    "stop and continue": 2,
}
DEADLY_KINDS = {
    "kill": 4,
    "stop": 3,
    "frame": 2,
    "memory limit": 1,
    "descriptor limit": 1,
    "memory cut": 0,
    "ports": 1,
    "full disk": 1,
    "thread limit": 0,
}
# Once in two decks.
RARE_KINDS = ("memory cut", "thread limit")
HTTP_SHAPES = (Shape("server", 1, True), Shape("server", 2, True), Shape("server", 1, False))
SHARED_SHAPES = (*HTTP_SHAPES, Shape("engine", 2, True))
DEADLY_SHAPES = tuple(
    Shape(kind, dp, routing) for kind in ("server", "engine") for dp in (1, 2) for routing in (True, False)
)
MOMENTS = ("start-up", "idle", "prefill", "decode", "control", "update", "shutdown")
DECK_SIZE = 50


@dataclass(frozen=True)
class Trial:
    """`moment` is empty where faults come without a moment: beside the witness, on a service that goes on."""

    seed: int
    kind: str
    shape: Shape
    moment: str = ""

    @property
    def is_deadly(self) -> bool:
        return self.kind in DEADLY_KINDS

    def dice(self) -> random.Random:
        return random.Random(f"{self.seed}, {self.kind}")


def kinds() -> tuple[str, ...]:
    return (*HTTP_KINDS, *SHARED_KINDS, *DEADLY_KINDS)


def draw(seed: int) -> Trial:
    """The trial of a seed, the same whatever is drawn beside it."""
    number, place = divmod(seed, DECK_SIZE)
    counts = HTTP_KINDS | SHARED_KINDS | DEADLY_KINDS
    deck = [kind for kind, count in counts.items() for _ in range(count)]
    deck.append(RARE_KINDS[number % len(RARE_KINDS)])
    assert len(deck) == DECK_SIZE, len(deck)
    random.Random(number).shuffle(deck)
    return deal(seed, deck[place])


def deal(seed: int, kind: str) -> Trial:
    """A trial of that kind."""
    choose = random.Random(f"{seed}, shape")
    if kind in HTTP_KINDS:
        return Trial(seed, kind, choose.choice(HTTP_SHAPES))
    if kind in SHARED_KINDS:
        shapes = [shape for shape in SHARED_SHAPES if shape.routing or kind != "claim frames"]
        return Trial(seed, kind, choose.choice(shapes))
    shapes = [shape for shape in DEADLY_SHAPES if shape.routing or kind != "memory cut"]
    moments = MOMENTS if kind in ("kill", "stop") else ("idle", "prefill", "decode", "control", "update")
    return Trial(seed, kind, choose.choice(shapes), choose.choice(moments))
