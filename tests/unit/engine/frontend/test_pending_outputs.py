"""Outputs that wait to be read: how many may, whose they are, and rows that arrive damaged."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from waybill.engine.frontend.dp_router import DpRouter
from waybill.engine.frontend.generation_gate import GenerationGate
from waybill.engine.frontend.in_flight_requests import InFlightRequests
from waybill.engine.frontend.leader_link import LeaderLink
from waybill.engine.frontend.pending_outputs import MAX_UNREAD_OUTPUTS, PendingOutputs
from waybill.engine.io_struct import OutputBatch, RequestOutput
from waybill.engine.ipc.frontend_messages import AbortReq, FrontendMessage
from waybill.engine.routing.geometry import RouteGeometry
from waybill.engine.routing.wire import encode


class Leader:
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.sent: list[FrontendMessage] = []

    def send(self, message: FrontendMessage) -> None:
        self.sent.append(message)

    def flush_and_close(self, timeout_s: float) -> None:
        pass


def pending_outputs(leader: Leader) -> PendingOutputs:
    return PendingOutputs(InFlightRequests(LeaderLink([leader]), DpRouter(1), GenerationGate(1.0, lambda: 0)))


def output(rid: str, **fields: Any) -> RequestOutput:
    return RequestOutput(rid, "", [1], 1, 1, 0, 0, "v", 0, **fields)


def test_all_samples_of_a_request_that_nobody_reads_are_aborted_and_no_other() -> None:
    async def run() -> None:
        leader = Leader()
        outputs = pending_outputs(leader)
        outputs.expect(["a", "ab"])
        other = outputs.expect(["other"])
        step = OutputBatch([output("a"), output("ab"), output("other")])
        for _ in range(MAX_UNREAD_OUTPUTS - 1):
            outputs.deliver(step, [])
            other.get_nowait()
        assert not leader.sent, "not yet"
        outputs.deliver(step, [])
        aborts = [message for message in leader.sent if isinstance(message, AbortReq) and message.exact]
        assert {message.rid for message in aborts} == {"a", "ab"} and len(aborts) == len(leader.sent)

    asyncio.run(run())


def test_a_rid_that_is_another_requests_by_now_stays_its() -> None:
    async def run() -> None:
        outputs = pending_outputs(Leader())
        first = outputs.expect(["a"])
        outputs.forget("a", first)
        second = outputs.expect(["a"])
        outputs.forget("a", first)
        outputs.deliver(OutputBatch([output("a")]), [])
        assert "a" in outputs and second.qsize() == 1 and first.empty()

    asyncio.run(run())


@pytest.mark.parametrize("is_damaged", [False, True])
def test_rows_are_verified_and_the_reason_told(is_damaged: bool) -> None:
    async def run() -> None:
        outputs = pending_outputs(Leader())
        queue = outputs.expect(["a"])
        geometry = RouteGeometry((0,), num_layers_total=1, max_tokens=1, top_k=2, num_experts=8)
        routed = encode(np.array([[[1, 2]]], np.uint8), 0, geometry, [("v", 0, 1)])
        frame = memoryview(b"\x07\x07") if is_damaged else routed.frame
        # Of the two outputs the one with rows has the frame, the other none.
        outputs.deliver(OutputBatch([output("b"), output("a", routed_experts=routed.meta)]), [frame])
        event = queue.get_nowait()
        assert not isinstance(event, Exception)
        told, rows = event
        if is_damaged:
            assert rows is None and told.routed_experts is None and "checksum" in str(told.routed_experts_error)
        else:
            assert rows is not None and rows.rows.tolist() == [[[1, 2]]] and told.routed_experts_error is None
        assert outputs.num_outputs == 2

    asyncio.run(run())
