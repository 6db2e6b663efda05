"""Outputs on their way from the engine to whoever waits for them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice

import msgspec

from ..io_struct import OutputBatch, RequestOutput
from ..routing.wire import RoutedExperts, decode, decode_weights
from .in_flight_requests import InFlightRequests

logger = logging.getLogger(__name__)

# A request whose caller leaves so many outputs unread is aborted.
MAX_UNREAD_OUTPUTS = 8192
UNREAD_CHECK = 1024

Event = tuple[RequestOutput, RoutedExperts | None] | Exception


class PendingOutputs:
    """One queue a request, under the rids of all its samples. Lives on one event loop."""

    def __init__(self, at_engine: InFlightRequests) -> None:
        self._at_engine = at_engine
        self._queues: dict[str, asyncio.Queue[Event]] = {}
        # Outputs with tokens that have come since the start.
        self.num_outputs = 0

    def __contains__(self, rid: str) -> bool:
        return rid in self._queues

    def expect(self, rids: Iterable[str]) -> asyncio.Queue[Event]:
        """Where the outputs of these samples come from now on, and the error given to `fail_all`."""
        queue: asyncio.Queue[Event] = asyncio.Queue()
        for rid in rids:
            self._queues[rid] = queue
        return queue

    def forget(self, rid: str, queue: asyncio.Queue[Event]) -> None:
        """Nothing more is expected there; an ended request's rid may be another's by now."""
        if self._queues.get(rid) is queue:
            del self._queues[rid]

    def fail_all(self, death: Exception) -> None:
        for queue in self._queues.values():
            queue.put_nowait(death)

    def deliver(self, batch: OutputBatch, frames: list[memoryview]) -> None:
        """Pass each output on, with its rows verified; a request that was given up meanwhile is dropped.

        Raises:
            ValueError: the message does not have a frame for each output with rows; whose rows they are cannot be told.
        """
        num_frames = [frames_of(output) for output in batch.outputs]
        if sum(num_frames) != len(frames):
            raise ValueError(f"{len(frames)} frames of rows came for outputs with {sum(num_frames)}")
        remaining = iter(frames)
        for output, num in zip(batch.outputs, num_frames, strict=True):
            self.num_outputs += bool(output.token_ids)
            event = verified(output, list(islice(remaining, num))) if num else (output, None)
            if output.is_at_engine:
                self._at_engine.abort(output.rid)
            elif output.finish_reason is not None:
                self._at_engine.end(output.rid)
            queue = self._queues.get(output.rid)
            if queue is not None:
                queue.put_nowait(event)
                self._limit_unread(queue)
        for rid in batch.left:
            self._at_engine.end(rid)

    def _limit_unread(self, queue: asyncio.Queue[Event]) -> None:
        """Abort all samples of a request whose caller does not read."""
        if queue.qsize() % UNREAD_CHECK:
            return
        rids = [rid for rid, owner in self._queues.items() if owner is queue]
        if queue.qsize() >= MAX_UNREAD_OUTPUTS * len(rids):
            logger.warning("%s: %d outputs wait to be read: aborted", rids[0], queue.qsize())
            for rid in rids:
                self._at_engine.abort(rid)


def frames_of(output: RequestOutput) -> int:
    """How many frames follow for it: its rows, if they are not behind a claim, and their combine weights."""
    if output.routed_experts is None or output.routed_experts_claim is not None:
        return 0
    return 1 if output.router_weights is None else 2


def verified(output: RequestOutput, frames: list[memoryview]) -> Event:
    """An output with its rows, or without them and with the reason."""
    rows = output.routed_experts
    assert rows is not None
    try:
        routed = decode(rows, frames[0])
        if output.router_weights is not None:
            routed = replace(routed, weights=decode_weights(output.router_weights, frames[1], rows))
        return output, routed
    except ValueError as error:
        logger.error("%s: %s", output.rid, error)
        missing = {"routed_experts": None, "router_weights": None, "routed_experts_error": str(error)}
        return msgspec.structs.replace(output, **missing), None
