"""Reasoning that a model writes before its answer, between two marks."""

from __future__ import annotations

from dataclasses import dataclass

from .delta import Delta, Reader, held_back


@dataclass(frozen=True)
class ReasoningFormat:
    """`always`: an answer begins with reasoning, whether or not prompt or answer have the mark. `by_default`: the model
    writes the mark itself, unless its template was told otherwise."""

    begin: str
    end: str
    always: bool = False
    by_default: bool = False

    def is_open(self, prompt_tail: str) -> bool:
        """Whether what follows a prompt is reasoning, without a mark."""
        tail = prompt_tail.rstrip()
        return tail.endswith(self.begin) or (self.always and not tail.endswith(self.end))

    def will_reason(self, prompt_tail: str) -> bool:
        """Whether an answer has reasoning, as far as can be known."""
        return self.is_open(prompt_tail) or (self.by_default and not prompt_tail.rstrip().endswith(self.end))


class ReasoningSplit:
    """Splits reasoning off, and hands the rest to a reader of calls, if there is one. White space around the marks is of
    neither part."""

    def __init__(self, form: ReasoningFormat, *, is_open: bool, rest: Reader | None, stream: bool = True) -> None:
        self._form = form
        self._rest = rest
        self._streams = stream
        self._text = ""
        # Before the first mark, in reasoning, or behind it.
        self._state = "reasoning" if is_open else "before"
        self._has_reasoning = False
        self._is_trimming = is_open
        self._whole = ""

    def push(self, text: str) -> list[Delta]:
        self._text += text
        if self._state == "before" and not self._begin():
            return []
        found: list[Delta] = []
        if self._state == "reasoning":
            if not self._has_reasoning and self._is_trimming:
                # The mark may stand in the answer as well as in the prompt.
                trimmed = self._text.lstrip()
                if not trimmed or (self._form.begin.startswith(trimmed) and trimmed != self._form.begin):
                    return []
                self._text = trimmed.removeprefix(self._form.begin)
                self._is_trimming = False
            self._reason(found)
        if self._state == "content" and self._text:
            found += self._content()
        return found

    def _begin(self) -> bool:
        """Whether it is known what the answer begins with."""
        trimmed = self._text.lstrip()
        if trimmed.startswith(self._form.begin):
            self._text = trimmed[len(self._form.begin) :]
            self._state = "reasoning"
        elif not self._form.begin.startswith(trimmed):
            self._state, self._is_trimming = "content", False
        else:
            return False
        return True

    def _reason(self, found: list[Delta]) -> None:
        if not self._has_reasoning:
            self._text = self._text.lstrip()
        place = self._text.find(self._form.end)
        if place >= 0:
            self._tell(self._text[:place].rstrip(), found)
            self._text = self._text[place + len(self._form.end) :]
            self._state, self._is_trimming = "content", True
            self._tell_whole(found)
            return
        kept = self._text[: len(self._text) - held_back(self._text, (self._form.end,))].rstrip()
        self._tell(kept, found)
        self._text = self._text[len(kept) :]

    def _tell(self, text: str, found: list[Delta]) -> None:
        if text:
            self._has_reasoning = True
            if self._streams:
                found.append(Delta(reasoning=text))
            else:
                self._whole += text

    def _tell_whole(self, found: list[Delta]) -> None:
        if self._whole:
            found.append(Delta(reasoning=self._whole))
            self._whole = ""

    def _content(self) -> list[Delta]:
        text, self._text = self._text, ""
        if self._is_trimming:
            text = text.lstrip()
            if not text:
                return []
            self._is_trimming = False
        return [Delta(content=text)] if self._rest is None else self._rest.push(text)

    def close(self) -> list[Delta]:
        found: list[Delta] = []
        if self._state == "reasoning":
            self._tell(self._text.rstrip(), found)
            self._tell_whole(found)
        elif self._text:
            self._is_trimming = False
            found += self._content()
        return found if self._rest is None else found + self._rest.close()
