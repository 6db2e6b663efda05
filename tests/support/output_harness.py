"""An output processor with a leader's half before it and what the frontend would receive behind it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

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
    Segment,
    StepRecord,
    TokenOutput,
)
from waybill.engine.output.output_processor import OutputProcessor
from waybill.engine.output.output_sender import OutputSender
from waybill.engine.routing.claims import ClaimStore
from waybill.engine.routing.geometry import RouteGeometry
from waybill.engine.routing.ring import RouteRing
from waybill.engine.routing.wire import decode

GEOMETRY = RouteGeometry(layer_ids=(1, 2), num_layers_total=3, max_tokens=8, top_k=2, num_experts=16)
LENGTH = FinishReason("length", length=1)


def int32(*numbers: int) -> bytes:
    return np.array(numbers, dtype="<i4").tobytes()


@dataclass
class Mailbox:
    """What the frontend would receive."""

    outputs: list[RequestOutput] = field(default_factory=list)
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    def send(self, batch: OutputBatch, frames: list[memoryview]) -> None:
        remaining = iter(frames)
        self.left += batch.left
        for output in batch.outputs:
            self.outputs.append(output)
            if output.routed_experts is not None and output.routed_experts_claim is None:
                self.rows[output.rid] = decode(output.routed_experts, next(remaining)).rows
        assert not list(remaining)


class Engine:
    """A leader's half: writes routing into the ring and records to the processor."""

    def __init__(self, *, routing: bool = True, claim_budget: int = 100_000) -> None:
        self.mailbox = Mailbox()
        self.claims = ClaimStore(claim_budget, 10.0, lambda: 0.0)
        self.output_sender = OutputSender(self.mailbox, None, self.claims)
        self.processor = OutputProcessor(self.output_sender)
        self.ring = RouteRing.create(GEOMETRY, 4)
        setup = RoutingSetup(0, 16, 1, GEOMETRY, RingPlace(self.ring.path, 4)) if routing else RoutingSetup(0, 16, 1)
        self.processor.handle(setup)
        self.steps = 0
        self.routing = routing

    def step(self, first_row: int = 0, version: str = "v1", **parts: list) -> None:
        num = sum(segment.num_tokens for segment in parts.get("segments", []))
        seq = -1
        if num and self.routing:
            seq = self.ring.acquire(1.0)
            self.ring.slot(seq, num)[:] = np.arange(first_row, first_row + num)[None, :, None] % 8 * 2 + [0, 1]
        self.processor.handle(StepRecord(0, self.steps, seq, 0, version, **parts))
        self.steps += 1
        while not self.output_sender._orders.empty():
            self.output_sender.ship(self.output_sender._orders.get())


def started(rid: str, num_prompt: int, **fields: object) -> ReqStarted:
    opted_in = {"return_routed_experts": True, "routed_experts_format": "compact"}
    return ReqStarted(rid, num_prompt, OutputOptions(**{**opted_in, **fields}))


def finish_at_once(engine: Engine, rid: str, pages: tuple[int, ...], first_row: int = 0, **fields: object) -> None:
    """A prompt on `pages` and one sampled token, in one step."""
    engine.step(
        first_row,
        before=[started(rid, len(pages), **fields), ReqAdmitted(rid, b"")],
        segments=[Segment(rid, 0, len(pages), int32(*pages))],
        outputs=[TokenOutput(rid, [5])],
        after=[ReqFinished(rid, LENGTH)],
    )
