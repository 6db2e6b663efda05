"""Requests as the frontend of a small engine takes them: its limits, and samples by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from waybill.engine.frontend.generate_request import expand, parse_generate_request
from waybill.engine.frontend.request_limits import EngineLimits
from waybill.engine.frontend.sample_request import SampleRequest
from waybill.engine.vision.image_store import StoredImage

LIMITS = EngineLimits(
    context_length=20,
    kv_cache_tokens=16,
    vocab_size=100,
    dp_size=1,
    has_tokenizer=True,
    routed_experts=True,
    router_weights=True,
)


def encode(text: str) -> list[int]:
    return [ord(c) % 100 for c in text]


def take(
    limits: EngineLimits = LIMITS,
    *,
    num_delivered: int = 0,
    images: Sequence[Sequence[StoredImage]] = (),
    **fields: Any,
) -> list[list[SampleRequest]]:
    """`num_delivered` rows of any prompt are with the caller of any session; `images` are those of each prompt."""
    request = parse_generate_request(fields)
    return expand(request, limits, encode, lambda session_id, ids: min(num_delivered, len(ids)), images)
