"""gpt-oss: messages on channels (harmony). `analysis` is reasoning, `final` the answer; what goes to a function is a call.

<|channel|>analysis<|message|>...<|end|>
<|start|>assistant<|channel|>commentary to=functions.NAME ...<|message|>{...}<|call|>
"""

from __future__ import annotations

import re

from .delta import Delta, call_of, found_first, held_back

HEADS = ("<|start|>", "<|channel|>")
MESSAGE = "<|message|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
RECIPIENT = re.compile(r"\bto=(?:functions\.)?([^\s<]+)")


class HarmonyReader:
    """One answer, with its special tokens in the text. `separates` reasoning, or leaves it in the content."""

    def __init__(self, *, separates: bool, stream: bool = True) -> None:
        self._separates = separates
        self._streams = stream
        self._text = ""
        self._in_head = False
        self._channel = "final"
        self._recipient: str | None = None
        # Of a call, or of reasoning that is told at its end.
        self._body = ""

    def push(self, text: str) -> list[Delta]:
        self._text += text
        found: list[Delta] = []
        while True:
            if self._in_head:
                head, mark, rest = self._text.partition(MESSAGE)
                if not mark:
                    return found
                self._read_head(head)
                self._text = rest
                continue
            place, mark = found_first(self._text, (*ENDS, *HEADS))
            if place < 0:
                kept = held_back(self._text, (*ENDS, *HEADS))
                self._tell(self._text[: len(self._text) - kept], found)
                self._text = self._text[len(self._text) - kept :]
                return found
            self._tell(self._text[:place], found)
            self._end_message(found)
            self._in_head = mark in HEADS
            self._text = self._text[place if self._in_head else place + len(mark) :]

    def _read_head(self, head: str) -> None:
        channel, recipient = CHANNEL.search(head), RECIPIENT.search(head)
        self._channel = "final" if channel is None else channel[1]
        self._recipient = None if recipient is None else recipient[1]
        self._in_head = False

    @property
    def _is_reasoning(self) -> bool:
        return self._channel == "analysis" and self._recipient is None

    def _tell(self, text: str, found: list[Delta]) -> None:
        if not text:
            return
        if self._recipient is not None or (self._is_reasoning and self._separates and not self._streams):
            self._body += text
        elif self._is_reasoning and self._separates:
            found.append(Delta(reasoning=text))
        else:
            found.append(Delta(content=text))

    def _end_message(self, found: list[Delta]) -> None:
        body, self._body = self._body, ""
        if self._recipient is not None:
            call = call_of(self._recipient, body)
            found.append(Delta(content=body) if call is None else Delta(call=call))
        elif body:
            found.append(Delta(reasoning=body))
        self._channel, self._recipient = "final", None

    def close(self) -> list[Delta]:
        found: list[Delta] = []
        if not self._in_head:
            self._tell(self._text, found)
        self._text = ""
        self._end_message(found)
        return [delta for delta in found if delta.content or delta.reasoning or delta.call]
