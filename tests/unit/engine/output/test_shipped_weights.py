"""Combine weights from the ring to an answer: beside the rows of who asked, missing with them, never without them."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import msgspec
import numpy as np
import pytest

from waybill.engine.entrypoints.openai.serving import routes_of
from waybill.engine.frontend.answer import Answer
from waybill.engine.frontend.pending_outputs import frames_of, verified
from waybill.engine.frontend.sample_request import SampleRequest
from waybill.engine.io_struct import (
    FinishReason,
    OutputBatch,
    OutputOptions,
    ReqAdmitted,
    ReqFinished,
    ReqStarted,
    RequestOutput,
    RingPlace,
    RoutingSetup,
    SamplingParams,
    Segment,
    StepRecord,
    TokenOutput,
)
from waybill.engine.output.output_processor import OutputProcessor
from waybill.engine.output.output_sender import OutputSender
from waybill.engine.routing.claims import ClaimStore
from waybill.engine.routing.geometry import RouteGeometry
from waybill.engine.routing.ring import RouteRing
from waybill.engine.routing.wire import RoutedExperts

GEOMETRY = RouteGeometry((1, 2), 3, 8, 2, 16, "bfloat16")
LENGTH = FinishReason("length", length=2)
ABORT = FinishReason("abort", message="by the caller")
# bfloat16's bits of 1.0, which the weight of row i in layer l and place k adds 4 * i + 2 * l + k to.
ONE = 0x3F80


class Engine:
    """A leader's half, and the frontend's: `verified` outputs by rid."""

    def __init__(self) -> None:
        self.outputs: list[tuple[RequestOutput, RoutedExperts | None]] = []
        self.spoil = False
        self.sender = OutputSender(self, None, ClaimStore(1 << 20, 10.0, lambda: 0.0))
        self.processor = OutputProcessor(self.sender)
        self.ring = RouteRing.create(GEOMETRY, 2)
        self.processor.handle(RoutingSetup(0, 16, 1, GEOMETRY, RingPlace(self.ring.path, 2)))
        self.step_number = self.num_rows = 0

    def send(self, batch: OutputBatch, frames: list[memoryview]) -> None:
        remaining = [memoryview(bytes(frame)) for frame in frames]
        for output in batch.outputs:
            num = frames_of(output)
            own, remaining = remaining[:num], remaining[num:]
            if self.spoil and num == 2:
                own[1] = memoryview(bytes(len(own[1])))
            event = verified(output, own) if num else (output, None)
            assert not isinstance(event, Exception)
            self.outputs.append(event)
        assert not remaining

    def step(self, **parts: Any) -> None:
        num = sum(segment.num_tokens for segment in parts.get("segments", []))
        seq = -1
        if num:
            seq = self.ring.acquire(1.0)
            self.ring.slot(seq, num)[:] = [0, 1]
            weights = self.ring.weights(seq, 0, num)
            assert weights is not None
            tokens = np.arange(self.num_rows, self.num_rows + num)
            weights[:] = ONE + tokens[None, :, None] * 4 + np.arange(4).reshape(2, 1, 2)
            self.num_rows += num
        self.processor.handle(StepRecord(0, self.step_number, seq, 0, "v", **parts))
        self.step_number += 1
        while not self.sender._orders.empty():
            self.sender.ship(self.sender._orders.get())


def bits(first: int, num: int) -> np.ndarray:
    """Of rows [num, M, K]."""
    return (ONE + np.arange(first, first + num)[:, None, None] * 4 + np.arange(4).reshape(1, 2, 2)).astype("<u2")


def options(**fields: Any) -> OutputOptions:
    asked = {"return_routed_experts": True, "return_router_weights": True, "routed_experts_format": "compact"}
    return OutputOptions(**{**asked, **fields})


def run(engine: Engine, rid: str, asked: OutputOptions, reason: FinishReason = LENGTH) -> None:
    """A prompt of three tokens and two new ones, over two steps."""
    first = np.array([0, 1, 2], "<i4").tobytes()
    engine.step(
        before=[ReqStarted(rid, 3, asked), ReqAdmitted(rid, b"")],
        segments=[Segment(rid, 0, 3, first)],
        outputs=[TokenOutput(rid, [5])],
    )
    engine.step(
        segments=[Segment(rid, 3, 1, np.array([3], "<i4").tobytes())],
        outputs=[TokenOutput(rid, [6])],
        after=[ReqFinished(rid, reason)],
    )


def render(event: tuple[RequestOutput, RoutedExperts | None], asked: OutputOptions, form: Any = "json") -> Any:
    sample = SampleRequest("r", 0, np.array([1, 2, 3]), SamplingParams(), asked)
    answer = Answer(sample, 3, form=form, token_text=None)
    answer.add(*event)
    return asyncio.run(answer.render())


@pytest.mark.parametrize("form", ["int32", "compact", "npy"])
@pytest.mark.parametrize("start", [0, 2, 3])
def test_weights_are_those_of_the_rows_in_an_envelope_of_their_own(form: str, start: int) -> None:
    engine, asked = Engine(), options(routed_experts_format=form, routed_experts_start_len=start)
    run(engine, "r", asked)
    ((output, routed),) = engine.outputs
    assert routed is not None and routed.weights is not None
    assert np.array_equal(routed.weights.rows, bits(start, 4 - start))
    answer = render((output, routed), asked)
    meta = msgspec.json.decode(msgspec.json.encode(answer["meta_info"]))
    assert base64.b64decode(meta["router_weights"]) == bits(start, 4 - start).tobytes()
    envelope, of_ids = meta["router_weights_meta"], meta["routed_experts_meta"]
    assert (envelope.pop("dtype"), of_ids.pop("dtype")) == ("bfloat16", "uint8")
    assert envelope.pop("checksum") != of_ids.pop("checksum")
    assert envelope == of_ids
    assert envelope["rows"] == 4 - start and envelope["layer_ids"] == [1, 2]
    assert {"router_weights", "router_weights_meta"} < routes_of(answer).keys()


def test_a_program_gets_numbers() -> None:
    engine, asked = Engine(), options()
    run(engine, "r", asked)
    found = render(engine.outputs[0], asked, "array")["meta_info"]["router_weights"]
    assert found.dtype == np.float32 and np.array_equal(found, (bits(0, 4).astype("<u4") << 16).view("<f4"))


def test_who_asks_for_ids_alone_gets_ids_alone() -> None:
    engine, asked = Engine(), options(return_router_weights=False)
    run(engine, "r", asked)
    ((output, routed),) = engine.outputs
    assert routed is not None and routed.weights is None and output.router_weights is None
    assert not [name for name in render((output, routed), asked)["meta_info"] if name.startswith("router_weights")]


def test_a_stream_of_rows_brings_their_weights() -> None:
    engine = Engine()
    run(engine, "r", options(stream=True, stream_routed_experts=True))
    parts = [routed.weights.rows for _, routed in engine.outputs if routed is not None and routed.weights is not None]
    assert [len(part) for part in parts] == [3, 1]
    assert np.array_equal(np.concatenate(parts), bits(0, 4))


def test_an_aborted_request_has_the_weights_of_the_rows_it_has() -> None:
    engine = Engine()
    run(engine, "r", options(), ABORT)
    routed = engine.outputs[0][1]
    assert routed is not None and routed.weights is not None and len(routed.weights.rows) == len(routed.rows) == 4
    engine.step(before=[ReqStarted("q", 3, options())], after=[ReqFinished("q", ABORT)])
    routed = engine.outputs[1][1]
    assert routed is not None and routed.weights is not None and routed.weights.rows.shape == (0, 2, 2)


@pytest.mark.parametrize("damaged", [False, True])
def test_missing_and_damaged_weights_are_null_with_the_reason(damaged: bool) -> None:
    engine, asked = Engine(), options()
    engine.spoil = damaged
    if damaged:
        run(engine, "r", asked)
    else:
        pages = np.array([0, 1], "<i4").tobytes()
        engine.step(before=[ReqStarted("r", 2, asked), ReqAdmitted("r", pages)], outputs=[TokenOutput("r", [5])])
        engine.step(after=[ReqFinished("r", LENGTH)])
    meta = render(engine.outputs[-1], asked)["meta_info"]
    assert meta["routed_experts"] is None and meta["router_weights"] is None
    assert meta["router_weights_error"] == meta["routed_experts_error"]
    assert ("router weights: checksum" if damaged else "rows are missing") in meta["router_weights_error"]
