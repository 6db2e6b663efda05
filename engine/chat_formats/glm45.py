"""GLM 4.5 and later: `<tool_call>NAME` and, for each argument, `<arg_key>key</arg_key><arg_value>value</arg_value>`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .delta import ToolCall, call_of
from .marked_calls import CallFormat, parameters_of
from .typed_values import value_of

CALL = re.compile(r"\s*([^\s<]+)\s*((?:<arg_key>.*)?)\Z", re.DOTALL)
ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)


def parse(body: str, tools: Sequence[dict[str, object]]) -> ToolCall | None:
    call = CALL.match(body)
    if call is None:
        return None
    schemas = parameters_of(call[1], tools)
    found = ((key.strip(), value) for key, value in ARGUMENT.findall(call[2]))
    return call_of(call[1], {key: value_of(value, schemas.get(key)) for key, value in found})


GLM45 = CallFormat("<tool_call>", "</tool_call>", parse, signs=("<arg_key>",))
