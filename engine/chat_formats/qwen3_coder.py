"""Qwen 3 Coder: `<tool_call><function=NAME><parameter=KEY>value</parameter>...</function></tool_call>`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .delta import ToolCall, call_of
from .marked_calls import CallFormat, parameters_of
from .typed_values import value_of

FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)(?:</function>\s*)?\Z", re.DOTALL)
# No name has a bracket: so each beginning is looked at once.
PARAMETER = re.compile(r"<parameter=([^<>\n]+)>(.*?)(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL)


def parse(body: str, tools: Sequence[dict[str, object]]) -> ToolCall | None:
    function = FUNCTION.match(body)
    if function is None:
        return None
    name = function[1].strip()
    schemas = parameters_of(name, tools)
    arguments = {}
    for key, value in PARAMETER.findall(function[2]):
        # One line break on either side belongs to the marks.
        text = value.removeprefix("\n").removesuffix("\n")
        arguments[key.strip()] = value_of(text, schemas.get(key.strip()))
    return call_of(name, arguments)


QWEN3_CODER = CallFormat("<tool_call>", "</tool_call>", parse, signs=("<function=",))
