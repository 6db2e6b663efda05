"""One answer of `/generate`, as far as rules look at it.

Legend: R rows (tokens as inputs), W ids of a row: all layers times experts per token.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np


class MalformedAnswer(Exception):
    """The answer is none of the dialect, or has no rows where they were asked for."""


@dataclass(frozen=True, eq=False)
class Answer:
    """`body` is `{text, output_ids, meta_info}`; `width` is W."""

    body: dict[str, Any]
    width: int

    @property
    def meta(self) -> dict[str, Any]:
        meta = self.body.get("meta_info")
        if not isinstance(meta, dict):
            raise MalformedAnswer("the answer has no meta_info")
        return meta

    @property
    def output_ids(self) -> list[int]:
        ids = self.body.get("output_ids")
        if not isinstance(ids, list):
            raise MalformedAnswer("the answer has no output_ids")
        return ids

    def count(self, name: str) -> int:
        """`prompt_tokens`, `completion_tokens` or `cached_tokens`."""
        value = self.meta.get(name)
        if not isinstance(value, int):
            raise MalformedAnswer(f"meta_info.{name} is {value!r}, must be a number")
        return value

    @property
    def cached_tokens(self) -> int:
        return self.count("cached_tokens")

    @property
    def num_inputs(self) -> int:
        """Tokens that were inputs: all but the last, which was sampled."""
        return self.count("prompt_tokens") + self.count("completion_tokens") - 1

    @property
    def finish_type(self) -> str | None:
        reason = self.meta.get("finish_reason")
        return reason.get("type") if isinstance(reason, dict) else reason

    @property
    def has_rows(self) -> bool:
        return "routed_experts" in self.meta

    def raw_bytes(self) -> bytes:
        """The rows' bytes, in whatever form was asked for."""
        encoded = self.meta.get("routed_experts")
        if not isinstance(encoded, str):
            reason = self.meta.get("routed_experts_error")
            raise MalformedAnswer(
                f"meta_info.routed_experts is {'null' if self.has_rows else 'absent'}"
                + (f": {reason}" if reason else "")
            )
        try:
            return base64.b64decode(encoded, validate=True)
        except ValueError as error:
            raise MalformedAnswer(f"meta_info.routed_experts is no base64: {error}") from None

    def rows(self) -> np.ndarray:
        """int32 [R, W]. However many there are: that their number is right is a rule of its own."""
        raw = self.raw_bytes()
        if len(raw) % (4 * self.width):
            raise MalformedAnswer(f"meta_info.routed_experts has {len(raw)} bytes, a row has {4 * self.width}")
        return np.frombuffer(raw, dtype="<i4").reshape(-1, self.width)
