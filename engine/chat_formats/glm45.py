"""GLM 4.5 and later: `<tool_call>NAME` and, for each argument, `<arg_key>key</arg_key><arg_value>value</arg_value>`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from .delta import ToolCall, call_of
from .marked_calls import CallFormat, parameters_of
from .typed_values import value_of

CALL = re.compile(r"\s*([^\s<]+)\s*((?:<arg_key>.*)?)\Z", re.DOTALL)
BEGIN_KEY, END_KEY, END_VALUE = "<arg_key>", "</arg_key>", "</arg_value>"
BEGIN_VALUE = re.compile(r"\s*<arg_value>")


def parse(body: str, tools: Sequence[dict[str, object]]) -> ToolCall | None:
    call = CALL.match(body)
    if call is None:
        return None
    schemas = parameters_of(call[1], tools)
    return call_of(call[1], {key: value_of(value, schemas.get(key)) for key, value in arguments_of(call[2])})


def arguments_of(text: str) -> Iterator[tuple[str, str]]:
    """Keys and values, read once from left to right: an expression would look for every end from every beginning."""
    place = 0
    while (begin := text.find(BEGIN_KEY, place)) >= 0:
        key_end = text.find(END_KEY, begin)
        if key_end < 0:
            return
        place = key_end + len(END_KEY)
        value = BEGIN_VALUE.match(text, place)
        if value is None:
            continue
        value_end = text.find(END_VALUE, value.end())
        if value_end < 0:
            return
        yield text[begin + len(BEGIN_KEY) : key_end].strip(), text[value.end() : value_end]
        place = value_end + len(END_VALUE)


GLM45 = CallFormat("<tool_call>", "</tool_call>", parse, signs=("<arg_key>",))
