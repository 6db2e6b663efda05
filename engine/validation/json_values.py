"""How much is in a JSON text, without making it: the decoder holds the interpreter's lock from end to end, so what it is
given must be bounded in values, not in bytes alone. 64 MB of `[],` take it 10 s; here they take half a second on a thread,
which holds the lock for none of it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

CHUNK_BYTES = 1 << 20
QUOTE, BACKSLASH, COMMA = b'"\\,'
# Brackets and braces of one side differ in one bit, which the comma has.
CASE, OPENING, CLOSING = 0x20, ord("{"), ord("}")

Bools = npt.NDArray[np.bool_]


def count_values(text: bytes, most: int) -> int:
    """Values of all depths outside of strings; stops beyond `most`. The text need not be valid."""
    return _count(text, most, top_only=False)


def count_fields(text: bytes, most: int) -> int:
    """Fields of the object that `text` is; stops beyond `most`."""
    return _count(text, most, top_only=True)


def _count(text: bytes, most: int, *, top_only: bool) -> int:
    data = np.frombuffer(text, np.uint8)
    total, depth = 1, 0
    in_string = escapes = False
    for first in range(0, len(data), CHUNK_BYTES):
        chunk = data[first : first + CHUNK_BYTES]
        outside, in_string, escapes = _outside_strings(chunk, in_string, escapes)
        folded = chunk | CASE
        marks = folded[((chunk == COMMA) | (folded == OPENING) | (folded == CLOSING)) & outside]
        if top_only:
            steps = (marks == OPENING).astype(np.int8) - (marks == CLOSING)
            depths = np.cumsum(steps, dtype=np.int64) + depth
            total += int(np.count_nonzero((marks == COMMA) & (depths == 1)))
            depth = int(depths[-1]) if len(depths) else depth
        else:
            total += int(np.count_nonzero(marks != CLOSING))
        if total > most:
            break
    return total


def _outside_strings(chunk: npt.NDArray[np.uint8], in_string: bool, escapes: bool) -> tuple[Bools, bool, bool]:
    """Which bytes are outside of strings; whether the next chunk begins inside one, and with an escaped byte."""
    quotes = chunk == QUOTE
    escaped, escapes = _escaped(chunk == BACKSLASH, escapes)
    quotes[escaped] = False
    inside = np.logical_xor.accumulate(quotes) ^ in_string
    return ~inside, bool(inside[-1]), escapes


def _escaped(backslashes: Bools, first: bool) -> tuple[npt.NDArray[np.int64], bool]:
    """Permits of the bytes after an odd run of backslashes, and whether the byte after the last one is such."""
    places = np.flatnonzero(backslashes)
    if first and len(places) and places[0] == 0:
        # The first backslash is escaped itself, and begins no run.
        places = places[1:]
    starts = places[np.flatnonzero(np.diff(places, prepend=-2) != 1)]
    ends = places[np.flatnonzero(np.diff(places, append=len(backslashes) + 1) != 1)]
    after = ends[(ends - starts) % 2 == 0] + 1
    leaves = bool(len(after)) and int(after[-1]) == len(backslashes)
    after = after[:-1] if leaves else after
    return (np.concatenate(([0], after)) if first else after), leaves
