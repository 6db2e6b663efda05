"""Combine weights beside the rows that they belong to, on two tensor-parallel ranks and the embedded model."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from support.engine_answers import GREEDY, ask, ids, rows_of

from waybill import Engine
from waybill.engine.routing.wire import checksum, weight_bits


def weights_of(answer: dict[str, Any]) -> np.ndarray:
    """Checked against what must hold for any."""
    meta = answer["meta_info"]
    weights, envelope = meta["router_weights"], meta["router_weights_meta"]
    assert weights.dtype == np.float32 and weights.shape == rows_of(answer).shape
    # The model computes in bfloat16, renormalises, and gives the best expert first.
    assert envelope["dtype"] == "bfloat16" and envelope["checksum"] == checksum(weight_bits(weights, "bfloat16").data)
    assert (np.diff(weights, axis=-1) <= 0).all() and (weights > 0).all()
    assert np.abs(weights.sum(axis=-1) - 1).max(initial=0) < 2**-7
    return weights


def test_combine_weights_are_those_of_the_rows(engine: Engine) -> None:
    """Slice and tail, cache hit, samples, a stream's parts: to the bit."""
    prompt = ids("combine weights, beside the rows")
    asked = {"return_router_weights": True}
    full = weights_of(ask(engine, prompt, **asked))
    for start in (1, len(prompt) - 1, len(prompt)):
        hit = ask(engine, prompt, routed_experts_start_len=start, **asked)
        assert hit["meta_info"]["cached_tokens"] >= len(prompt) - 1
        # The prompt's last row is computed anew, by a step of another size.
        assert weights_of(hit)[: max(0, len(prompt) - 1 - start)].tobytes() == full[start : len(prompt) - 1].tobytes()
        again = ask(engine, prompt, routed_experts_start_len=0, **asked)
        assert weights_of(again)[start:].tobytes() == weights_of(hit).tobytes()
    assert "router_weights" not in ask(engine, prompt)["meta_info"]
    samples = engine.generate(input_ids=prompt, sampling_params=GREEDY | {"n": 3}, return_routed_experts=True, **asked)
    assert {weights_of(one)[: len(prompt) - 1].tobytes() for one in samples} == {full[: len(prompt) - 1].tobytes()}
    parts = [
        weights_of(chunk)
        for chunk in engine.generate(
            input_ids=prompt,
            sampling_params=GREEDY,
            stream=True,
            stream_routed_experts=True,
            return_routed_experts=True,
            **asked,
        )
    ]
    assert len(parts) == 6 and np.concatenate(parts)[: len(prompt) - 1].tobytes() == full[: len(prompt) - 1].tobytes()
    text = ask(engine, prompt, routed_experts_format="int32", **asked)["meta_info"]
    assert base64.b64decode(text["router_weights"]) == weight_bits(weights_of(again), "bfloat16").tobytes()


def test_weights_of_a_session_s_turns_are_those_of_the_whole(engine: Engine) -> None:
    asked = {"session_id": "weighed", "routed_experts_start_len": "auto", "return_router_weights": True}
    tokens = ids("a session with weights")
    parts = []
    for turn in (b"", b" and a turn", b" and one more"):
        tokens = tokens + list(turn)
        answer = ask(engine, tokens, **asked)
        parts.append(weights_of(answer))
        tokens += answer["output_ids"]
    whole = engine.generate(
        input_ids=tokens, sampling_params={"max_new_tokens": 0}, return_routed_experts=True, return_router_weights=True
    )
    assert weights_of(whole)[:-1].tobytes() == np.concatenate(parts).tobytes()


def test_combine_weights_by_reference_are_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match="return_router_weights: needs routed_experts_delivery='inline'"):
        ask(engine, ids("by reference"), return_router_weights=True, routed_experts_delivery="reference")
