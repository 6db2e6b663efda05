"""Log-probabilities of an answer: triples of all that came, as far as they were asked for."""

from __future__ import annotations

import pytest

from waybill.engine.frontend.answer_logprobs import AnswerLogprobs
from waybill.engine.io_struct import Logprobs, OutputOptions

PARTS = (
    (Logprobs([-1.0], [[(-1.0, 7)]], [(None, 3), (-2.0, 4)], [None, [(-2.0, 4)]]), [7]),
    (Logprobs([-3.0, -4.0], [[(-0.5, 1)], [(-4.0, 9)]]), [8, 9]),
    (Logprobs(), []),
)


def rendered(options: OutputOptions) -> dict[str, object]:
    logprobs = AnswerLogprobs(options, str)
    for new, token_ids in PARTS:
        logprobs.add(new, token_ids)
    return logprobs.render()


def test_pieces_are_joined_with_the_ids_that_they_belong_to() -> None:
    options = OutputOptions(return_logprob=True, logprob_start_len=0, top_logprobs_num=1)
    assert rendered(options) == {
        "output_token_logprobs": [(-1.0, 7, None), (-3.0, 8, None), (-4.0, 9, None)],
        "input_token_logprobs": [(None, 3, None), (-2.0, 4, None)],
        "output_top_logprobs": [[(-1.0, 7, None)], [(-0.5, 1, None)], [(-4.0, 9, None)]],
        "input_top_logprobs": [None, [(-2.0, 4, None)]],
    }


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (OutputOptions(return_logprob=True), ["output_token_logprobs"]),
        (OutputOptions(return_logprob=True, logprob_start_len=1), ["output_token_logprobs", "input_token_logprobs"]),
        (OutputOptions(return_logprob=True, top_logprobs_num=1), ["output_token_logprobs", "output_top_logprobs"]),
    ],
)
def test_an_answer_has_only_what_was_asked_for(options: OutputOptions, names: list[str]) -> None:
    assert list(rendered(options)) == names


def test_text_is_made_where_it_is_asked_for() -> None:
    options = OutputOptions(return_logprob=True, return_text_in_logprobs=True)
    assert rendered(options)["output_token_logprobs"] == [(-1.0, 7, "7"), (-3.0, 8, "8"), (-4.0, 9, "9")]


def test_a_token_without_its_log_probability_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        AnswerLogprobs(OutputOptions(return_logprob=True), None).add(Logprobs(), [7])


def test_what_was_rendered_does_not_grow() -> None:
    logprobs = AnswerLogprobs(OutputOptions(return_logprob=True), None)
    logprobs.add(*PARTS[0])
    before = logprobs.render()
    logprobs.add(*PARTS[1])
    assert before == {"output_token_logprobs": [(-1.0, 7, None)]}
