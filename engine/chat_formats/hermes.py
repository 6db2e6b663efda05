"""Hermes, Qwen 2.5 and Qwen 3: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from .delta import ToolCall, call_of
from .marked_calls import CallFormat


def parse(body: str, tools: Sequence[dict[str, object]]) -> ToolCall | None:
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict):
        return None
    return call_of(call.get("name"), call.get("arguments", call.get("parameters")))


HERMES = CallFormat("<tool_call>", "</tool_call>", parse, signs=("<tool_call>",))
