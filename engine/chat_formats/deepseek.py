"""DeepSeek V3 and R1, with the arguments in a block of code, and V3.1, with bare ones."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .delta import ToolCall, call_of
from .marked_calls import CallFormat

BEGIN, END, SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
FRAMES = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
IN_BLOCK = re.compile(r"\s*function" + SEPARATOR + r"([^\n]+)\n```json\n(.*?)\n?```\s*\Z", re.DOTALL)


def parse_v3(body: str, tools: Sequence[dict[str, object]]) -> ToolCall | None:
    call = IN_BLOCK.match(body)
    return None if call is None else call_of(call[1].strip(), call[2])


def parse_v31(body: str, tools: Sequence[dict[str, object]]) -> ToolCall | None:
    name, separator, arguments = body.partition(SEPARATOR)
    return call_of(name.strip(), arguments) if separator else None


DEEPSEEK_V3 = CallFormat(BEGIN, END, parse_v3, FRAMES, signs=("<｜tool▁calls▁begin｜>", "```json"))
DEEPSEEK_V31 = CallFormat(BEGIN, END, parse_v31, FRAMES, signs=("<｜tool▁calls▁begin｜>",))
