"""Readers of answers: what they find does not depend on how a stream was cut, and is what the model has written."""

from __future__ import annotations

import json
import timeit
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from waybill.engine.chat_formats import glm45, qwen3_coder
from waybill.engine.chat_formats.delta import Reader
from waybill.engine.chat_formats.formats import REASONING_PARSERS, ChatFormats, detect_tool_parser
from waybill.engine.chat_formats.json_array import array_schema

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "parameters": {"type": "object", "properties": {"where": {"type": "string"}, "n": {"type": "integer"}}},
        },
    },
    {"type": "function", "function": {"name": "stop"}},
]
BODY = '{"where": "a <b>\\n é", "n": 3}'
CALLS = [("look", {"where": "a <b>\n é", "n": 3}), ("stop", {})]
LOOK = "<tool_call>\n" + json.dumps({"name": "look", "arguments": CALLS[0][1]}) + "\n</tool_call>"
FRAME = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
CALL = ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>")
# An answer with text and two calls, as each format writes it.
ANSWERS = {
    "hermes": "Let me see.\n" + LOOK + '\n<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>',
    "qwen3_coder": "Let me see.\n<tool_call>\n<function=look>\n<parameter=where>\na <b>\n é\n</parameter>\n<parameter=n>\n"
    "3\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=stop>\n</function>\n</tool_call>",
    "glm45": "Let me see.\n<tool_call>look\n<arg_key>where</arg_key>\n<arg_value>a <b>\n é</arg_value>\n<arg_key>n"
    "</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>stop\n</tool_call>",
    "deepseekv3": f"Let me see.{FRAME[0]}{CALL[0]}function{CALL[1]}look\n```json\n{BODY}\n```{CALL[2]}\n"
    f"{CALL[0]}function{CALL[1]}stop\n```json\n{{}}\n```{CALL[2]}{FRAME[1]}",
    "deepseekv31": f"Let me see.{FRAME[0]}{CALL[0]}look{CALL[1]}{BODY}{CALL[2]}{CALL[0]}stop{CALL[1]}{{}}"
    f"{CALL[2]}{FRAME[1]}",
    "kimi_k2": "Let me see.<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0<|tool_call_argument_begin|>"
    + BODY
    + "<|tool_call_end|><|tool_call_begin|>functions.stop:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
    "<|tool_calls_section_end|>",
    "gpt-oss": "<|channel|>commentary<|message|>Let me see.<|end|><|start|>assistant<|channel|>commentary "
    f"to=functions.look <|constrain|>json<|message|>{BODY}<|call|><|start|>assistant to=functions.stop<|channel|>"
    "commentary json<|message|>{}",
}


def read(reader: Reader | None, pieces: list[str]) -> tuple[str, str, list[tuple[str, Any]]]:
    """Content, reasoning and calls."""
    assert reader is not None
    found = [delta for piece in pieces for delta in reader.push(piece)] + reader.close()
    calls = [(delta.call.name, json.loads(delta.call.arguments)) for delta in found if delta.call is not None]
    return "".join(delta.content for delta in found), "".join(delta.reasoning for delta in found), calls


def reader_of(tools: str = "none", reasoning: str = "none", tail: str = "", **options: Any) -> Reader | None:
    given_tools = TOOLS if tools != "none" else []
    defaults: dict[str, Any] = {"separates": True, "streams_reasoning": True, "is_array": False}
    return ChatFormats(tools, reasoning).reader(given_tools, prompt_tail=tail, **(defaults | options))


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]


CUTS = st.lists(st.integers(0, 1000), max_size=40)


@pytest.mark.parametrize("name", ANSWERS)
@settings(max_examples=30, deadline=None)
@given(cuts=CUTS)
def test_calls_are_found_however_a_stream_is_cut(name: str, cuts: list[int]) -> None:
    assert read(reader_of(name), pieces_of(ANSWERS[name], cuts)) == ("Let me see.", "", CALLS)


@pytest.mark.parametrize("name", ANSWERS)
def test_character_by_character(name: str) -> None:
    assert read(reader_of(name), list(ANSWERS[name])) == ("Let me see.", "", CALLS)


MARKS = [
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
    "{",
    "}",
    '"name": "f"',
    "<",
    " ",
    "\n",
    "x",
    "<|channel|>final",
]
MARKS += ["<|message|>", "<|end|>", *FRAME, *CALL, "<|tool_call_begin|>", "[", ",", '{"name": "f", "parameters": {}}']


@pytest.mark.parametrize("name", [*ANSWERS, "array"])
@pytest.mark.parametrize("reasoning", ["none", "qwen3", "deepseek-r1", "gpt-oss"])
@settings(max_examples=30, deadline=None)
@given(parts=st.lists(st.sampled_from(MARKS), max_size=12), cuts=CUTS)
def test_whatever_is_written_a_stream_says_what_the_whole_says(
    name: str, reasoning: str, parts: list[str], cuts: list[int]
) -> None:
    text = "".join(parts)
    tools, is_array = ("hermes", True) if name == "array" else (name, False)
    whole = read(reader_of(tools, reasoning, is_array=is_array), [text])
    assert read(reader_of(tools, reasoning, is_array=is_array), pieces_of(text, cuts)) == whole


@settings(max_examples=30, deadline=None)
@given(cuts=CUTS)
def test_calls_that_a_grammar_made(cuts: list[int]) -> None:
    text = json.dumps([{"name": name, "parameters": arguments} for name, arguments in CALLS], indent=1)
    assert read(reader_of("hermes", is_array=True), pieces_of(text, cuts)) == ("", "", CALLS)
    # The length ended it: what is whole is told.
    content, _, calls = read(reader_of("hermes", is_array=True), pieces_of(text[:-9], cuts))
    assert calls == CALLS[:1] and content.startswith(",")


def test_what_is_no_call_stays_text() -> None:
    for text in ("a <tool_call>no</tool_call> b", "a <tool_call>{", "  spaces  ", "<tool_cal"):
        assert read(reader_of("hermes"), list(text)) == (text, "", [])


@pytest.mark.parametrize(
    ("parser", "tail", "text", "content", "reasoning"),
    [
        ("qwen3", "assistant\n", "<think>\nhm\n</think>\n\nyes", "yes", "hm"),
        ("qwen3", "assistant\n", "yes <think>", "yes <think>", ""),
        ("qwen3", "assistant\n<think>\n\n</think>\n\n", "yes", "yes", ""),
        ("qwen3", "assistant\n<think>\n", "hm\n\n</think>\n\nyes", "yes", "hm"),
        ("deepseek-r1", "", "hm hm", "", "hm hm"),
        ("deepseek-r1", "", "<think>hm</think>yes", "yes", "hm"),
        ("kimi", "", "◁think▷hm◁/think▷ yes", "yes", "hm"),
        ("glm45", "", "\n<think></think>\nyes", "yes", ""),
        (
            "gpt-oss",
            "",
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>yes",
            "yes",
            "hm",
        ),
    ],
)
def test_reasoning_apart(parser: str, tail: str, text: str, content: str, reasoning: str) -> None:
    for streams in (True, False):
        reader = reader_of(reasoning=parser, tail=tail, streams_reasoning=streams)
        assert read(reader, list(text)) == (content, reasoning, [])


def test_reasoning_before_calls() -> None:
    text = "<think>\nhm\n</think>\n\n" + ANSWERS["hermes"]
    assert read(reader_of("hermes", "qwen3"), list(text)) == ("Let me see.", "hm", CALLS)
    assert reader_of(reasoning="qwen3", separates=False) is None, "then it is content, as it is"


def test_a_template_shows_its_family() -> None:
    for name, text in ANSWERS.items():
        assert detect_tool_parser(text) == name
    assert detect_tool_parser("{{ messages }}") == "none"


def test_definitions_of_tools_are_those_of_the_array() -> None:
    point = {"type": "object"}
    functions = [{"name": "f", "parameters": {"$ref": "#/$defs/p", "$defs": {"p": point}}}, {"name": "g"}]
    schema = array_schema(functions, parallel=False)
    assert schema["$defs"] == {"p": point} and schema["maxItems"] == 1
    other = {"name": "h", "parameters": {"$defs": {"p": {"type": "string"}}}}
    with pytest.raises(ValueError, match="different schemas for \\$defs 'p'"):
        array_schema([*functions, other], parallel=True)


def test_definitions_that_are_no_object_are_refused() -> None:
    for definitions in ("x", [1], 5):
        with pytest.raises(ValueError, match="\\$defs of 'f' must be an object"):
            array_schema([{"name": "f", "parameters": {"$defs": definitions}}], parallel=True)


@pytest.mark.parametrize(
    ("parse", "begin", "repeated"),
    [
        (glm45.parse, "f", "<arg_key>"),
        (glm45.parse, "f<arg_key>a</arg_key>", "<arg_key>a</arg_key>"),
        (glm45.parse, "f<arg_key>a", "</arg_key><arg_value><arg_key>b"),
        (qwen3_coder.parse, "<function=f>", "<parameter="),
        (qwen3_coder.parse, "<function=f>", "<parameter=a>"),
    ],
)
def test_a_body_is_read_once(parse: Any, begin: str, repeated: str) -> None:
    """What never ends must not be looked for from every beginning: eight times the text takes about eight times as long,
    not 64 times. A caller can make a model write this, and it is read on the event loop."""

    def seconds(times: int) -> float:
        body = begin + repeated * times
        return min(timeit.repeat(lambda: parse(body, []), number=1, repeat=3))

    assert seconds(16_000) < 30 * max(seconds(2_000), 1e-4)


def test_every_reasoning_parser_makes_a_reader() -> None:
    for name in REASONING_PARSERS:
        assert (reader_of(reasoning=name) is None) == (name == "none")
