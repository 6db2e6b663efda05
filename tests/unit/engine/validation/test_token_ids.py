"""Token ids of every form that callers have them in, and what is none."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from waybill.engine.validation import token_ids
from waybill.engine.validation.token_ids import as_prompts, parse_ids

IDS = st.lists(st.integers(-5, 2**31 - 1), max_size=12)


def plain(prompts: Any) -> Any:
    return [ids.tolist() for ids in prompts] if isinstance(prompts, list) else prompts.tolist()


@settings(max_examples=200, deadline=None)
@given(value=IDS | st.lists(IDS, min_size=1, max_size=5), piece=st.integers(16, 40), spaced=st.booleans())
def test_json_is_read_piece_by_piece(value: Any, piece: int, spaced: bool) -> None:
    text = json.dumps(value, indent=1 if spaced else None).encode()
    with pytest.MonkeyPatch.context() as patch:
        # A piece holds at least one id with its white space.
        patch.setattr(token_ids, "PIECE_BYTES", piece)
        assert plain(parse_ids(text, "input_ids")) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1", "must be a list of token ids"),
        ('{"a": 1}', "must be a list of token ids"),
        ('[1, "a"]', r"input_ids\.1: must be an integer"),
        ("[1.0]", r"input_ids\.0: must be an integer"),
        ("[true]", r"input_ids\.0: must be an integer"),
        ("[[1], 2]", r"input_ids\.1: must be a list"),
        ("[[1], [[2]]]", r"input_ids\.1\.0: must be an integer"),
        ("[1, [2]]", r"input_ids\.1: must be an integer"),
        ("[3000000000]", "3000000000 is no token"),
        (f"[{10**30}]", "is no token"),
    ],
)
def test_json_that_is_no_ids_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_ids(text.encode(), "input_ids")


@pytest.mark.parametrize(
    ("value", "ids"),
    [
        ([1, 2], [1, 2]),
        ((1, 2), [1, 2]),
        ([], []),
        ([np.int64(1), 2, np.uint8(3)], [1, 2, 3]),
        (np.array([1, 2]), [1, 2]),
        (np.array([1, 2], dtype=np.uint16), [1, 2]),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        ([np.array([1, 2]), np.array([3])], [[1, 2], [3]]),
        ([np.array([1, 2]), [3]], [[1, 2], [3]]),
    ],
)
def test_lists_and_arrays_of_integers(value: Any, ids: list[Any]) -> None:
    found = as_prompts(value, "input_ids")
    assert plain(found) == ids
    assert all(one.dtype == np.int32 for one in (found if isinstance(found, list) else [found]))


class Tensor:
    """As a torch tensor: no list, no array."""


@pytest.mark.parametrize(
    "value",
    [
        *([True], [np.bool_(True)], [1.0], ["a"], ["a" * 1000, 1], [[1], 2], "no", {1: 2}, 7, [2**70], [None]),
        *(np.array([1.5]), np.array([True]), np.array(3), np.zeros((1, 1, 1), int), np.array([2**63], np.uint64)),
        *(Tensor(), [Tensor()], [np.array([1.5])]),
    ],
)
def test_what_is_no_integer_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="input_ids") as refusal:
        as_prompts(value, "input_ids")
    assert len(str(refusal.value)) < 200


def test_prompts_in_one_request_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_ids, "MAX_PROMPTS", 3)
    for read in (lambda: parse_ids(b"[[],[],[],[]]", "input_ids"), lambda: as_prompts([[]] * 4, "input_ids")):
        with pytest.raises(ValueError, match="at most 3 prompts"):
            read()
