"""Calls that a grammar made: a JSON array of `{"name": ..., "parameters": {...}}`, whatever the model was trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .delta import Delta, call_of


class JsonArrayCalls:
    """Tells each call when it is whole. What is no such array, because the length ended it, is text at the end."""

    def __init__(self) -> None:
        self._text = ""
        # How far calls were told.
        self._told = 0

    def push(self, text: str) -> list[Delta]:
        self._text += text
        # An element ends with a brace; between two of them nothing can.
        return self._read() if "}" in text else []

    def _read(self) -> list[Delta]:
        decoder = json.JSONDecoder()
        found: list[Delta] = []
        while True:
            place = self._told
            while place < len(self._text) and self._text[place] in " \t\r\n[,":
                place += 1
            try:
                call, end = decoder.raw_decode(self._text, place)
            except (ValueError, RecursionError):
                return found
            read = call_of(call.get("name"), call.get("parameters")) if isinstance(call, dict) else None
            if read is None:
                return found
            found.append(Delta(call=read))
            self._told = end

    def close(self) -> list[Delta]:
        found = self._read()
        rest = self._text[self._told :]
        return [*found, Delta(content=rest)] if rest.strip(" \t\r\n[],") else found


def array_schema(functions: Sequence[dict[str, Any]], *, parallel: bool) -> dict[str, Any]:
    """The schema of calls of these functions, one at least.

    Raises:
        ValueError: two of them define a different schema under one name, or definitions are no object.
    """
    definitions: dict[str, dict[str, Any]] = {"$defs": {}, "definitions": {}}
    choices = []
    for function in functions:
        parameters = dict(function.get("parameters") or {"type": "object"})
        for place, known in definitions.items():
            # `#/$defs/...` is looked up from the root.
            given = parameters.pop(place, None) or {}
            if not isinstance(given, dict):
                raise ValueError(f"{place} of {function['name']!r} must be an object")
            for name, schema in given.items():
                if known.setdefault(name, schema) != schema:
                    raise ValueError(f"two tools have different schemas for {place} {name!r}")
        choices.append(
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, "parameters": parameters},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    items = choices[0] if len(choices) == 1 else {"anyOf": choices}
    most = {} if parallel else {"maxItems": 1}
    kept = {place: known for place, known in definitions.items() if known}
    return {"type": "array", "minItems": 1, "items": items, **most, **kept}
