"""Arguments that a model writes as bare text: what they are, the tool's schema says."""

from __future__ import annotations

import json
from typing import Any


def value_of(text: str, schema: dict[str, object] | None) -> Any:
    """Text where the schema asks for text, or where it is no JSON; else what it is as JSON."""
    kind = None if schema is None else schema.get("type")
    if kind == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {"True": True, "False": False, "None": None}.get(text, text)
