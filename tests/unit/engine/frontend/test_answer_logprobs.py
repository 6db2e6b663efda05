"""Log-probabilities of an output: triples of what it brings, as far as they were asked for."""

from __future__ import annotations

import pytest

from waybill.engine.frontend.answer_logprobs import LOGPROB_FIELDS, AnswerLogprobs
from waybill.engine.io_struct import Logprobs, OutputOptions

NEW = Logprobs([-1.0, -3.0], [[(-1.0, 7)], [(-0.5, 1)]], [(None, 3), (-2.0, 4)], [None, [(-2.0, 4)]], [None, 9])


def rendered(options: OutputOptions) -> dict[str, object]:
    return AnswerLogprobs(options, str).render(NEW, [7, 8])


def test_values_stand_with_the_ids_that_they_belong_to() -> None:
    options = OutputOptions(return_logprob=True, logprob_start_len=0, top_logprobs_num=1)
    fields = {
        "output_token_logprobs": [(-1.0, 7, None), (-3.0, 8, None)],
        "input_token_logprobs": [(None, 3, None), (-2.0, 4, None)],
        "input_token_ranks": [None, 9],
        "output_top_logprobs": [[(-1.0, 7, None)], [(-0.5, 1, None)]],
        "input_top_logprobs": [None, [(-2.0, 4, None)]],
    }
    assert rendered(options) == fields
    assert list(fields) == list(LOGPROB_FIELDS)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (OutputOptions(return_logprob=True), ["output_token_logprobs", "input_token_logprobs"]),
        (
            OutputOptions(return_logprob=True, logprob_start_len=1),
            ["output_token_logprobs", "input_token_logprobs", "input_token_ranks"],
        ),
        (
            OutputOptions(return_logprob=True, top_logprobs_num=1),
            ["output_token_logprobs", "input_token_logprobs", "output_top_logprobs"],
        ),
    ],
)
def test_an_answer_has_only_what_was_asked_for(options: OutputOptions, names: list[str]) -> None:
    assert list(rendered(options)) == names
    assert list(AnswerLogprobs(options, str).render(Logprobs(), [])) == names, "also an output that brings none"


def test_log_probabilities_of_the_prompt_are_an_empty_list_where_they_were_not_asked_for() -> None:
    assert rendered(OutputOptions(return_logprob=True))["input_token_logprobs"] == []


def test_those_of_the_prompt_are_empty_lists_where_another_engine_answers_with_them() -> None:
    options = OutputOptions(return_logprob=True, logprob_start_len=0, top_logprobs_num=1)
    found = AnswerLogprobs(options, None, has_prompt=False).render(NEW, [7, 8])
    assert list(found) == list(LOGPROB_FIELDS)
    assert [name for name, values in found.items() if not values] == [
        *("input_token_logprobs", "input_token_ranks", "input_top_logprobs")
    ]
    assert NEW.input, "what came is as it was"


def test_text_is_made_where_it_is_asked_for() -> None:
    options = OutputOptions(return_logprob=True, return_text_in_logprobs=True)
    assert rendered(options)["output_token_logprobs"] == [(-1.0, 7, "7"), (-3.0, 8, "8")]


def test_a_token_without_its_log_probability_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        AnswerLogprobs(OutputOptions(return_logprob=True), None).render(Logprobs(), [7])
