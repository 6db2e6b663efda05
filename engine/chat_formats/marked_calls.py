"""Calls between two marks in text: the reader that most formats share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .delta import Delta, ToolCall, found_first, held_back

ParseCall = Callable[[str, Sequence[dict[str, object]]], ToolCall | None]


@dataclass(frozen=True)
class CallFormat:
    """How a family of models writes a call: `begin`, what `parse` reads, `end`. `frames` stand around several calls, and
    are no text. `signs` are what a chat template of the family has in it."""

    begin: str
    end: str
    parse: ParseCall
    frames: tuple[str, ...] = ()
    signs: tuple[str, ...] = ()


class MarkedCalls:
    """Reads calls of one format. What cannot be parsed stays text; so does white space, but for that around calls.

    A call is told when it is whole: its name and its arguments at once.
    """

    def __init__(self, form: CallFormat, tools: Sequence[dict[str, object]]) -> None:
        self._form = form
        self._tools = tools
        self._text = ""
        # White space that is text if text follows.
        self._space = ""
        self._body: str | None = None
        self._has_calls = False

    def push(self, text: str) -> list[Delta]:
        found: list[Delta] = []
        self._text += text
        while True:
            if self._body is not None:
                if not self._read_call(found):
                    return found
                continue
            place, mark = found_first(self._text, (self._form.begin, *self._form.frames))
            if place < 0:
                kept = held_back(self._text, (self._form.begin, *self._form.frames))
                self._tell(self._text[: len(self._text) - kept], found)
                self._text = self._text[len(self._text) - kept :]
                return found
            self._tell(self._text[:place], found)
            self._text = self._text[place + len(mark) :]
            if mark == self._form.begin:
                self._body = ""
            else:
                self._space = ""

    def close(self) -> list[Delta]:
        found: list[Delta] = []
        if self._body is not None:
            # The end mark may be the token that ends the answer.
            body = self._body + self._text
            self._text = ""
            self._conclude(body, "", found)
        self._tell(self._text, found)
        if self._space and not self._has_calls:
            found.append(Delta(content=self._space))
        return found

    def _read_call(self, found: list[Delta]) -> bool:
        place = self._text.find(self._form.end)
        if place < 0:
            assert self._body is not None
            kept = held_back(self._text, (self._form.end,))
            self._body += self._text[: len(self._text) - kept]
            self._text = self._text[len(self._text) - kept :]
            return False
        body = (self._body or "") + self._text[:place]
        self._text = self._text[place + len(self._form.end) :]
        self._conclude(body, self._form.end, found)
        return True

    def _conclude(self, body: str, end: str, found: list[Delta]) -> None:
        self._body = None
        call = self._form.parse(body, self._tools)
        if call is None:
            self._tell(self._form.begin + body + end, found)
        else:
            self._space = ""
            self._has_calls = True
            found.append(Delta(call=call))

    def _tell(self, text: str, found: list[Delta]) -> None:
        text = self._space + text
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if shown and self._has_calls:
            # Behind a call.
            shown = shown.lstrip() if not found or found[-1].call is not None else shown
        if shown:
            found.append(Delta(content=shown))


def parameters_of(name: str, tools: Sequence[dict[str, object]]) -> dict[str, dict[str, object]]:
    """The schemas of a tool's parameters, by name."""
    for tool in tools:
        function = tool.get("function")
        if isinstance(function, dict) and function.get("name") == name:
            parameters = function.get("parameters")
            properties = parameters.get("properties") if isinstance(parameters, dict) else None
            if isinstance(properties, dict):
                return {key: value for key, value in properties.items() if isinstance(value, dict)}
    return {}
