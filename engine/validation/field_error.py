"""A refusal (HTTP 400) that knows its field, so that whoever passes it on can say the field's name in the caller's own
dialect."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

# A name or value that a message quotes is cut to so many characters: a caller may have chosen it.
MAX_SHOWN_CHARS = 64


class FieldError(ValueError):
    """One field is wrong. The message begins with the field, or speaks of what it holds.

    Args:
        field: its name, with dots where it lies inside another.
        mentions: other fields that the message names.
        item: in a batch, the prompt that it belongs to.
    """

    def __init__(self, message: str, field: str, *, mentions: tuple[str, ...] = (), item: int | None = None) -> None:
        super().__init__(message if item is None else f"item {item}: {message}")
        self._message = message
        self.field = field
        self._mentions = mentions
        self._item = item

    def of_item(self, item: int) -> FieldError:
        """The same, in a batch."""
        return FieldError(self._message, self.field, mentions=self._mentions, item=item)

    def inside(self, path: Sequence[str]) -> FieldError:
        """The same of a field that lies inside others."""
        if not path:
            return self
        prefix = "".join(f"{part}." for part in path)
        begins = self._message.startswith(self.field)
        message = prefix + self._message if begins else self._message
        return FieldError(message, prefix + self.field, mentions=self._mentions, item=self._item)

    def renamed(self, names: Mapping[str, str]) -> FieldError:
        """The same in the words of a dialect that calls fields otherwise. Its fields are flat: `sampling_params.` goes."""
        plain = self.field.removeprefix("sampling_params.")
        head, dot, rest = plain.partition(".")
        field = names.get(head, head) + dot + rest
        message = self._message
        if message.startswith(self.field):
            message = field + message.removeprefix(self.field)
        for name in self._mentions:
            message = re.sub(rf"\b{name}\b", names.get(name, name), message)
        return FieldError(message, field, item=self._item)


def shown(value: object) -> str:
    """A name as a message may show it: as it is, or quoted where it is odd, and cut."""
    text = str(value)
    if len(text) > MAX_SHOWN_CHARS:
        text = text[:MAX_SHOWN_CHARS] + "..."
    return text if text.isidentifier() or isinstance(value, int) else repr(text)
