"""How an answer says which rows it has."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from typing import Any

import msgspec
import numpy as np
import pytest

from waybill.engine.entrypoints.openai.serving import routes_of
from waybill.engine.frontend.answer import Answer
from waybill.engine.frontend.sample_request import SampleRequest
from waybill.engine.io_struct import FinishReason, OutputOptions, RequestOutput, SamplingParams
from waybill.engine.routing.geometry import RouteGeometry
from waybill.engine.routing.wire import RouterWeights, encode, encode_weights


def answer_to(
    form: str, delivery: str, reason: FinishReason, token_ids: list[int], error: str | None
) -> dict[str, Any]:
    options = OutputOptions(return_routed_experts=True, routed_experts_format=form, routed_experts_delivery=delivery)
    sample = SampleRequest("r", 0, np.array([1, 2]), SamplingParams(), options)
    answer = Answer(sample, 2, form="json", token_text=None)
    answer.add(
        RequestOutput("r", "", token_ids, 2, len(token_ids), 0, 0, "v", 0, reason, routed_experts_error=error), None
    )
    return asyncio.run(answer.render())


def test_versions_of_tokens_have_the_field_s_form() -> None:
    sample = SampleRequest("r", 0, np.array([1, 2]), SamplingParams(), OutputOptions())
    answer = Answer(sample, 2, form="json", token_text=None)
    runs = [("v1", 0, 1), ("v2", 1, 3)]
    reason = FinishReason("length", length=3)
    answer.add(RequestOutput("r", "", [5, 6, 7], 2, 3, 0, 0, "v2", 0, reason, token_weight_versions=runs), None)
    meta = asyncio.run(answer.render())["meta_info"]
    assert meta["weight_versions"] == [
        {"version": "v1", "start": 0, "end": 1},
        {"version": "v2", "start": 1, "end": 3},
    ]
    assert meta["weight_version"] == "v2"


@pytest.mark.parametrize("delivery", ["inline", "reference"])
@pytest.mark.parametrize("reason", [FinishReason("abort", message="by the caller"), FinishReason.failed("broken")])
def test_an_abort_before_the_first_token_has_no_key_in_the_field_s_form(delivery: str, reason: FinishReason) -> None:
    answer = answer_to("int32", delivery, reason, [], None)
    assert not [key for key in answer["meta_info"] if key.startswith("routed_experts")]
    assert routes_of(answer) == {}, "nor has OpenAI's form"


@pytest.mark.parametrize(
    ("form", "reason", "token_ids"),
    [
        ("int32", FinishReason("length", length=1), [5]),
        ("int32", FinishReason("length", length=0), []),
        ("int32", FinishReason("abort", message="late"), [5]),
        ("compact", FinishReason("abort", message="early"), []),
    ],
)
def test_rows_that_are_missing_are_told_in_every_other_case(
    form: str, reason: FinishReason, token_ids: list[int]
) -> None:
    meta = answer_to(form, "inline", reason, token_ids, "2 rows are missing")["meta_info"]
    assert meta["routed_experts"] is None and meta["routed_experts_error"] == "2 rows are missing"


def test_combine_weights_are_widened_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of 32k rows take a tenth of a second, in which no other request would get its outputs."""
    geometry = RouteGeometry((0, 1), 2, 8, 2, 4, "bfloat16")
    routed = encode(np.zeros((3, 2, 2)), 0, geometry, [("v", 0, 3)])
    weights = encode_weights(np.full((3, 2, 2), 0x3F00), 0, geometry, [("v", 0, 3)])
    widen, threads = RouterWeights.as_float32, []

    def noted(self: RouterWeights) -> np.ndarray:
        threads.append(threading.current_thread())
        return widen(self)

    monkeypatch.setattr(RouterWeights, "as_float32", noted)
    options = OutputOptions(return_routed_experts=True, return_router_weights=True, routed_experts_format="compact")
    answer = Answer(
        SampleRequest("r", 0, np.array([1, 2]), SamplingParams(), options), 2, form="array", token_text=None
    )
    output = RequestOutput("r", "", [5, 6], 2, 2, 0, 0, "v", 0, FinishReason("length", length=2))
    output = msgspec.structs.replace(output, routed_experts=routed.meta, router_weights=weights.meta)
    answer.add(output, dataclasses.replace(routed, weights=weights))
    found = asyncio.run(answer.render())["meta_info"]["router_weights"]
    assert np.array_equal(found, np.full((3, 2, 2), 0.5, np.float32))
    assert len(threads) == 1 and threads[0] is not threading.main_thread()
