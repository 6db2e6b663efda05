"""vLLM's `structured_outputs`, in the endpoints that take it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerFast

from waybill.engine.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest
from waybill.engine.entrypoints.openai.structured_outputs import parse_structured_outputs
from waybill.engine.entrypoints.vllm.token_protocol import TokenRequest
from waybill.engine.grammar.grammar_text import ANY_OBJECT, from_regex
from waybill.engine.validation.field_error import FieldError
from waybill.engine.validation.request_model import validate

CHECKPOINT = Path(__file__).parents[4] / "examples" / "tiny_moe" / "checkpoint"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TAG = {"structures": [{"begin": "<f>", "schema": {}, "end": "</f>"}], "triggers": ["<f>"]}


@pytest.mark.parametrize(
    ("given_fields", "native"),
    [
        ({"json": SCHEMA}, {"json_schema": SCHEMA}),
        ({"json": "{}"}, {"json_schema": "{}"}),
        ({"regex": "a+", "json": None, "disable_fallback": False}, {"regex": "a+"}),
        ({"choice": ["yes", "no.", "a|b"]}, {"regex": r"yes|no\.|a\|b"}),
        ({"grammar": "root ::= [0-9]+"}, {"ebnf": "root ::= [0-9]+"}),
        ({"json_object": True}, {"json_schema": ANY_OBJECT}),
        ({"structural_tag": TAG}, {"structural_tag": TAG}),
    ],
)
def test_each_kind_in_each_endpoint(given_fields: dict[str, Any], native: dict[str, Any]) -> None:
    chat = validate(ChatCompletionRequest, {"input_ids": [5], "structured_outputs": given_fields})
    completion = validate(CompletionRequest, {"prompt": "x", "structured_outputs": given_fields})
    tokens = validate(TokenRequest, {"token_ids": [1], "sampling_params": {"structured_outputs": given_fields}})
    for params in (
        chat.generate_fields(4)["sampling_params"],
        completion.generate_fields(4)["sampling_params"],
        tokens.sampling_params.native(4),
    ):
        assert native.items() <= params.items()
    assert chat.has_grammar
    (kind,) = (name for name, value in given_fields.items() if value)
    (name,) = native
    refused = FieldError(f"sampling_params.{name}: is bad", f"sampling_params.{name}")
    assert str(refused.renamed(chat.names())) == f"structured_outputs.{kind}: is bad"
    assert str(refused.renamed(tokens.names())) == f"sampling_params.structured_outputs.{kind}: is bad"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("a+", "structured_outputs: must be an object"),
        ({}, "structured_outputs: must have exactly one of json, regex, grammar, structural_tag, choice, json_object"),
        ({"regex": "a", "json_object": True}, "structured_outputs: must have exactly one of"),
        ({"regex": 7}, "structured_outputs.regex: must be text"),
        ({"json": 7}, "structured_outputs.json: must be text or an object"),
        ({"choice": []}, "structured_outputs.choice: must be a list of texts, at least one and none empty"),
        ({"choice": ["a", ""]}, "structured_outputs.choice: must be a list of texts, at least one and none empty"),
        ({"choice": ["a", 1]}, "structured_outputs.choice: must be a list"),
        ({"json_object": "yes"}, "structured_outputs.json_object: must be true or absent"),
        ({"regex": "a", "whitespace_pattern": " "}, "structured_outputs.whitespace_pattern: is not supported"),
        ({"regex": "a", "colour": 1}, "structured_outputs.colour: is no field of this request"),
    ],
)
def test_what_is_refused_by_name(value: Any, words: str) -> None:
    for model, fields, prefix in (
        (ChatCompletionRequest, {"input_ids": [5], "structured_outputs": value}, ""),
        (TokenRequest, {"token_ids": [1], "sampling_params": {"structured_outputs": value}}, "sampling_params."),
    ):
        with pytest.raises(FieldError) as caught:
            validate(model, fields)
        assert str(caught.value).startswith(prefix + words)


def test_one_grammar_a_request() -> None:
    both = {"input_ids": [5], "structured_outputs": {"regex": "a"}}
    with pytest.raises(FieldError, match="structured_outputs: must be absent beside regex"):
        validate(ChatCompletionRequest, {**both, "regex": "b"})
    with pytest.raises(FieldError, match="response_format: must be absent beside structured_outputs"):
        validate(ChatCompletionRequest, {**both, "response_format": {"type": "json_object"}})
    validate(ChatCompletionRequest, {**both, "response_format": {"type": "text"}})


TOKENIZER = from_tokenizer(PreTrainedTokenizerFast(tokenizer_file=str(CHECKPOINT / "tokenizer.json")))


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=5), min_size=1))
def test_a_choice_is_taken_and_nothing_else(choices: list[str]) -> None:
    regex = parse_structured_outputs({"choice": choices}).grammar["regex"]
    compiled = LLMatcher(TOKENIZER, from_regex(regex))
    assert not compiled.is_error(), compiled.get_error()
    for text in [*choices, choices[0] + "~"]:
        matcher = compiled.deep_copy()
        taken = all(matcher.consume_token(token) for token in text.encode()) and matcher.is_accepting()
        assert taken == (text in choices)
