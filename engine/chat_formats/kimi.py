"""Kimi K2: `<|tool_call_begin|>functions.NAME:INDEX<|tool_call_argument_begin|>{...}<|tool_call_end|>` in a section."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from .delta import ToolCall, call_of
from .marked_calls import CallFormat

CALL = re.compile(r"\s*((?:functions\.)?([^\s:]+):\d+)\s*<\|tool_call_argument_begin\|>(.*)\Z", re.DOTALL)
FRAMES = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")


def parse(body: str, tools: Sequence[dict[str, object]]) -> ToolCall | None:
    call = CALL.match(body)
    if call is None:
        return None
    found = call_of(call[2], call[3])
    # The template writes the id back as it came.
    return None if found is None else replace(found, id=call[1])


KIMI = CallFormat("<|tool_call_begin|>", "<|tool_call_end|>", parse, FRAMES, signs=("<|tool_calls_section_begin|>",))
