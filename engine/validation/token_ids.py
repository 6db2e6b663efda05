"""Token ids as callers give them: JSON, lists, numpy arrays. They become arrays of int32, a bounded piece at a time, and
the first item that is none ends it.

A prompt of a million ids is 4 MB here; as a list of Python's integers it would be ten times that.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from .field_error import FieldError

Ids: TypeAlias = npt.NDArray[np.int32]
# One prompt or several.
Prompts: TypeAlias = Ids | list[Ids]

# Prompts in one request; how many may run and wait is the engine's to say.
MAX_PROMPTS = 1 << 16
# The interpreter's lock is held for some milliseconds a piece.
PIECE_BYTES = 128 << 10
PIECE_ITEMS = 32 << 10
MAX_ID = 2**31 - 1

_DECODER = msgspec.json.Decoder(list[int])
_SPACE = re.compile(rb"[ \t\r\n]*")
_LIST = re.compile(rb"[ \t\r\n]*\[")
_NEXT = re.compile(rb"[ \t\r\n]*,")

NESTED_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ]
}


def parse_ids(text: bytes, field: str) -> Prompts:
    """Ids of a JSON array of integers, or of arrays of integers.

    Raises:
        FieldError: it is anything else.
    """
    opening = _LIST.match(text)
    if opening is None:
        raise FieldError(f"{field}: must be a list of token ids", field)
    if _LIST.match(text, opening.end()) is None:
        return _parse_flat(text, opening.end(), text.rfind(b"]"), field)
    prompts: list[Ids] = []
    start = opening.end()
    while (inner := _LIST.match(text, start)) is not None:
        end = text.find(b"]", inner.end())
        prompts.append(_parse_flat(text, inner.end(), end, f"{field}.{len(prompts)}"))
        _check_count(len(prompts), field)
        following = _NEXT.match(text, end + 1)
        if following is None:
            break
        start = following.end()
    if inner is None or _SPACE.sub(b"", text[end + 1 : end + 1 + PIECE_BYTES]) != b"]":
        raise FieldError(f"{field}.{len(prompts)}: must be a list of token ids, as the items before it", field)
    return prompts


def _parse_flat(text: bytes, start: int, end: int, field: str) -> Ids:
    """The ids between two brackets."""
    pieces: list[Ids] = []
    num = 0
    while True:
        cut = end if end - start <= PIECE_BYTES else text.rfind(b",", start, start + PIECE_BYTES)
        if cut < start:
            raise FieldError(f"{field}.{num}: must be an integer", field)
        try:
            items = _DECODER.decode(b"[" + text[start:cut] + b"]")
        except msgspec.DecodeError as error:
            found = re.search(r"\$\[(\d+)\]", str(error))
            where = f"{field}.{num + int(found[1])}" if found else field
            raise FieldError(f"{where}: must be an integer", field) from None
        pieces.append(_array(items, field, num))
        num += len(items)
        if cut == end:
            return np.concatenate(pieces)
        start = cut + 1


def as_prompts(value: Any, field: str) -> Prompts:
    """Ids as a program gives them: a list of integers (Python's or numpy's), a 1-D or 2-D integer array, a list of either.

    Raises:
        FieldError: it is anything else.
    """
    if isinstance(value, np.ndarray) and value.ndim == 2:
        return [as_ids(row, field) for row in value]
    if isinstance(value, list | tuple) and value and isinstance(value[0], list | tuple | np.ndarray):
        _check_count(len(value), field)
        return [as_ids(item, f"{field}.{index}") for index, item in enumerate(value)]
    return as_ids(value, field)


def as_ids(value: Any, field: str) -> Ids:
    """
    Raises:
        FieldError: it is no list or 1-D array of integers.
    """
    if isinstance(value, np.ndarray):
        if value.ndim != 1 or not np.issubdtype(value.dtype, np.integer):
            raise FieldError(
                f"{field}: must be an integer array of one or two dimensions, not {value.dtype} of {value.ndim}", field
            )
        return _in_range(value, field)
    if not isinstance(value, list | tuple):
        # A torch tensor among them: it may live on a device, and is the caller's to copy.
        raise FieldError(
            f"{field}: must be a list of token ids or an integer numpy array, not {type(value).__name__}", field
        )
    pieces = [_checked(value[i : i + PIECE_ITEMS], field, i) for i in range(0, len(value), PIECE_ITEMS)]
    return np.concatenate(pieces) if pieces else np.empty(0, np.int32)


def _checked(items: Sequence[Any], field: str, first: int) -> Ids:
    # True is no 1.
    odd = {kind for kind in set(map(type, items)) if kind is bool or not issubclass(kind, int | np.integer)}
    if odd:
        index = next(index for index, item in enumerate(items, first) if type(item) in odd)
        raise FieldError(f"{field}.{index}: must be an integer", field)
    return _array(items, field, first)


def _array(items: Sequence[Any], field: str, first: int) -> Ids:
    try:
        return _in_range(np.array(items, dtype=np.int64), field)
    except OverflowError:
        index = next(index for index, item in enumerate(items, first) if not -(2**63) <= item < 2**63)
        raise FieldError(f"{field}.{index}: is no token: has more than 64 bits", field) from None


def _in_range(ids: npt.NDArray[Any], field: str) -> Ids:
    if len(ids) and (ids.min() < -MAX_ID or ids.max() > MAX_ID):
        bad = int(ids[(ids < -MAX_ID) | (ids > MAX_ID)][0])
        raise FieldError(f"{field}: {bad} is no token", field)
    return ids.astype(np.int32)


def _check_count(num: int, field: str) -> None:
    if num > MAX_PROMPTS:
        raise FieldError(f"{field}: must be at most {MAX_PROMPTS} prompts", field)
