"""Routed experts as the field's frameworks decode them, written from the contract alone."""

from __future__ import annotations

import base64

import numpy as np


def decode_routed_experts(text: str, num_tokens: int, start: int, num_layers: int, top_k: int) -> np.ndarray:
    """base64 of little-endian int32 to [num_tokens - 1 - start, num_layers, top_k]; refuses any other size."""
    flat = np.frombuffer(base64.b64decode(text, validate=True), dtype="<i4")
    shape = (num_tokens - 1 - start, num_layers, top_k)
    assert flat.size == int(np.prod(shape)), f"{flat.size} numbers, {shape} needs {int(np.prod(shape))}"
    return flat.reshape(shape)


def merge(existing: np.ndarray | None, start: int, new: np.ndarray) -> np.ndarray:
    """`existing[:start] + new`."""
    if existing is None:
        assert start == 0
        return new
    assert len(existing) >= start
    return np.concatenate([existing[:start], new])
