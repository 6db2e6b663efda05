"""The formats by their names, and which one a checkpoint's chat template is of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .deepseek import DEEPSEEK_V3, DEEPSEEK_V31
from .delta import Reader
from .glm45 import GLM45
from .harmony import HarmonyReader
from .hermes import HERMES
from .json_array import JsonArrayCalls
from .kimi import KIMI
from .marked_calls import CallFormat, MarkedCalls
from .qwen3_coder import QWEN3_CODER
from .reasoning import ReasoningFormat, ReasoningSplit

GPT_OSS = "gpt-oss"
AUTO = "auto"
NONE = "none"
TOOL_FORMATS: Mapping[str, CallFormat] = {
    "hermes": HERMES,
    "qwen": HERMES,
    "qwen25": HERMES,
    "qwen3_coder": QWEN3_CODER,
    "deepseekv3": DEEPSEEK_V3,
    "deepseekv31": DEEPSEEK_V31,
    "kimi_k2": KIMI,
    "glm45": GLM45,
}
# By what its template has; the first that fits.
DETECTED = ("qwen3_coder", "glm45", "deepseekv3", "deepseekv31", "kimi_k2", "hermes")
REASONING_FORMATS: Mapping[str, ReasoningFormat] = {
    "deepseek-r1": ReasoningFormat("<think>", "</think>", always=True),
    "deepseek-v3": ReasoningFormat("<think>", "</think>"),
    "qwen3": ReasoningFormat("<think>", "</think>", by_default=True),
    "qwen3-thinking": ReasoningFormat("<think>", "</think>", always=True),
    "glm45": ReasoningFormat("<think>", "</think>", by_default=True),
    "kimi": ReasoningFormat("◁think▷", "◁/think▷", by_default=True),
    "kimi_k2": ReasoningFormat("<think>", "</think>", by_default=True),
}
TOOL_PARSERS = (AUTO, NONE, *TOOL_FORMATS, GPT_OSS)
REASONING_PARSERS = (NONE, *REASONING_FORMATS, GPT_OSS)


def detect_tool_parser(template: str) -> str:
    """`none` where nothing is known."""
    if "<|channel|>" in template and "<|message|>" in template:
        return GPT_OSS
    fits = (name for name in DETECTED if all(sign in template for sign in TOOL_FORMATS[name].signs))
    return next(fits, NONE)


@dataclass(frozen=True)
class ChatFormats:
    """What a server reads in answers; names of `TOOL_PARSERS` without `auto`, and of `REASONING_PARSERS`."""

    tools: str = NONE
    reasoning: str = NONE

    @property
    def reasoning_format(self) -> ReasoningFormat | None:
        return REASONING_FORMATS.get(self.reasoning)

    @property
    def uses_channels(self) -> bool:
        return GPT_OSS in (self.tools, self.reasoning)

    def reader(
        self,
        tools: Sequence[dict[str, Any]],
        *,
        prompt_tail: str,
        separates: bool,
        streams_reasoning: bool,
        is_array: bool,
    ) -> Reader | None:
        """Of one answer; None where it is text alone.

        Args:
            tools: those that may be called.
            prompt_tail: the end of the prompt's text.
            separates: reasoning from content.
            is_array: a grammar has the calls written as an array, see `json_array.py`.
        """
        if self.uses_channels and not is_array and (tools or self.reasoning == GPT_OSS):
            return HarmonyReader(separates=separates and self.reasoning == GPT_OSS, stream=streams_reasoning)
        calls: Reader | None = None
        if is_array:
            calls = JsonArrayCalls()
        elif tools and self.tools in TOOL_FORMATS:
            calls = MarkedCalls(TOOL_FORMATS[self.tools], tools)
        form = self.reasoning_format
        if form is None or not separates:
            return calls
        return ReasoningSplit(form, is_open=form.is_open(prompt_tail), rest=calls, stream=streams_reasoning)
