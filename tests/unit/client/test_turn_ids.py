"""Ids of the next turn: what was sampled stays, and what the template would have written instead is reported."""

from __future__ import annotations

import pytest

from waybill.client.turn_ids import next_turn_ids

END, NEW_LINE = 9, 8
PROMPT, ASKED = [1, 2], [5, 6]


def test_what_the_template_writes_is_what_was_sampled() -> None:
    answered = [1, 2, 3, 4, END, NEW_LINE]
    turn = next_turn_ids(PROMPT, [3, 4, END], answered, answered + ASKED, is_cut=False)
    assert (turn.input_ids, turn.drift) == ([1, 2, 3, 4, END, NEW_LINE, *ASKED], None)


def test_another_way_to_write_the_answer_is_reported_and_not_taken() -> None:
    answered = [1, 2, 34, END, NEW_LINE]
    turn = next_turn_ids(PROMPT, [3, 4, END], answered, answered + ASKED, is_cut=False)
    assert (turn.input_ids, turn.drift) == ([1, 2, 3, 4, END, NEW_LINE, *ASKED], 2)


def test_reasoning_that_a_template_drops_is_kept() -> None:
    answered = [1, 2, 4, END]
    turn = next_turn_ids(PROMPT, [7, 7, 4, END], answered, answered + ASKED, is_cut=False)
    assert (turn.input_ids, turn.drift) == ([1, 2, 7, 7, 4, END, *ASKED], 2)


def test_a_cut_answer_goes_on_where_nothing_drifts_and_is_refused_otherwise() -> None:
    answered = [1, 2, 3, 4, END]
    turn = next_turn_ids(PROMPT, [3, 4], answered, answered + ASKED, is_cut=True)
    assert turn.input_ids == [1, 2, 3, 4, END, *ASKED]
    with pytest.raises(ValueError, match="was cut"):
        # Its last token stands behind the end of the turn, too.
        next_turn_ids(PROMPT, [3, 10], [1, 2, 3, END, 10], [1, 2, 3, END, 10, *ASKED], is_cut=True)
    with pytest.raises(ValueError, match="other tokens from 3 on, and none that ends"):
        next_turn_ids(PROMPT, [3, 44], answered, answered + ASKED, is_cut=False)


def test_a_template_that_rewrites_history_is_refused() -> None:
    with pytest.raises(ValueError, match="in another way when messages follow"):
        next_turn_ids(PROMPT, [3, END], [1, 2, 3, END], [1, 2, END, *ASKED], is_cut=False)
    with pytest.raises(ValueError, match="output_ids"):
        next_turn_ids(PROMPT, [], [1, 2], [1, 2], is_cut=False)
