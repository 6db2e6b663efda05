"""The shipping half of the output processor: text, envelopes and sockets, on a thread of its own.

It receives what the filing thread has cut out already, and never touches the ledger.
"""

from __future__ import annotations

import logging
import queue
import time
from dataclasses import dataclass, field

import msgspec

from ..io_struct import FinishReason, Logprobs, OutputBatch, ReqStarted, RequestOutput, TokenOutput
from ..ipc.critical_thread import start_critical_thread
from ..ipc.sockets import Sender
from ..routing.claims import ClaimError, ClaimStore
from ..routing.geometry import RouteGeometry
from ..routing.ledger import RouteSlice
from ..routing.wire import RoutedExperts, encode, encode_weights
from ..text.token_decoder import TokenDecoder
from .detokenizer import Detokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Routes:
    """What a finished request gets of its routing: a slice, or the reason why there is none."""

    rows: RouteSlice | None = None
    error: str | None = None


class Progress(msgspec.Struct, frozen=True):
    """One request's part of a step, as the filing thread passes it on. It makes one a token: a struct costs it a fifth of
    a frozen dataclass."""

    rid: str
    output: TokenOutput | None = None
    cached_tokens: int = 0
    num_retractions: int = 0
    finish_reason: FinishReason | None = None
    routes: Routes | None = None


@dataclass(frozen=True)
class ShipmentOrder:
    """A step's worth of news."""

    dp_rank: int
    weight_version: str
    started: list[ReqStarted]
    progress: list[Progress]


@dataclass
class _Parcel:
    """What has piled up for one request since its last output."""

    started: ReqStarted
    # None: making its output has failed, and its caller was told; what comes until the engine has finished it is dropped.
    detokenizer: Detokenizer | None
    num_output: int = 0
    first_token_at: float | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: Logprobs | None = None
    # Runs (version, start, end) of all tokens so far: the weights of the forward that each was sampled from.
    versions: list[tuple[str, int, int]] = field(default_factory=list)

    def add(self, output: TokenOutput, weight_version: str) -> None:
        start = self.num_output
        self.num_output += len(output.token_ids)
        if self.first_token_at is None and self.num_output:
            self.first_token_at = time.perf_counter()
        if self.versions and self.versions[-1][0] == weight_version:
            start = self.versions.pop()[1]
        if start < self.num_output:
            self.versions.append((weight_version, start, self.num_output))
        self.token_ids += output.token_ids
        if output.logprobs is not None:
            if self.logprobs is None:
                self.logprobs = Logprobs()
            self.logprobs.extend(output.logprobs)

    def last_version(self, order: ShipmentOrder) -> str:
        """The weights of the last token; the present ones where there is none."""
        return self.versions[-1][0] if self.versions else order.weight_version

    def clear(self) -> None:
        self.token_ids, self.logprobs = [], None


class OutputSender:
    """Turns orders into `OutputBatch` messages. `run` is the thread's body."""

    def __init__(self, sender: Sender[OutputBatch], decoder: TokenDecoder | None, claims: ClaimStore) -> None:
        self._sender = sender
        self._decoder = decoder
        self._claims = claims
        self._parcels: dict[str, _Parcel] = {}
        self._orders: queue.SimpleQueue[ShipmentOrder] = queue.SimpleQueue()
        self.geometry: RouteGeometry | None = None
        self.num_rows_shipped = 0
        self.num_bytes_shipped = 0
        # Requests whose text or rows could not be made.
        self.num_failed = 0

    def submit(self, order: ShipmentOrder) -> None:
        """Called by the filing thread; never blocks."""
        self._orders.put(order)

    def start(self) -> None:
        start_critical_thread(self.run, "output sender")

    def run(self) -> None:
        while True:
            self.ship(self._orders.get())

    def ship(self, order: ShipmentOrder) -> None:
        """Detokenise, encode and send one step's outputs as one message."""
        outputs: list[RequestOutput] = []
        frames: list[memoryview] = []
        left: list[str] = []
        for started in order.started:
            self._start(order, started, outputs)
        for progress in order.progress:
            parcel = self._parcels[progress.rid]
            if parcel.detokenizer is not None:
                self._add_output(order, progress, parcel, parcel.detokenizer, outputs, frames)
            elif progress.finish_reason is not None:
                left.append(progress.rid)
            if progress.finish_reason is not None:
                del self._parcels[progress.rid]
        if outputs or left:
            self._sender.send(OutputBatch(outputs, left), frames)

    def _start(self, order: ShipmentOrder, started: ReqStarted, outputs: list[RequestOutput]) -> None:
        parcel = self._parcels[started.rid] = _Parcel(started, None)
        try:
            parcel.detokenizer = Detokenizer(self._decoder, started.options, started.stop)
        except Exception as error:
            # See `_add_output`.
            outputs.append(self._fail(order, Progress(started.rid), parcel, error))

    def _add_output(
        self,
        order: ShipmentOrder,
        progress: Progress,
        parcel: _Parcel,
        detokenizer: Detokenizer,
        outputs: list[RequestOutput],
        frames: list[memoryview],
    ) -> None:
        """What there is to send of one request. Text and rows are made by libraries, of what a model happened to sample: if
        that fails it fails this request, whose caller is told, and no other."""
        if progress.output is not None:
            parcel.add(progress.output, order.weight_version)
        if progress.finish_reason is None and not (parcel.started.options.stream and parcel.token_ids):
            return
        frame: list[memoryview] = []
        try:
            output = self._make_output(order, progress, parcel, detokenizer)
            if progress.routes is not None:
                output, frame = self._attach_routes(output, progress.routes, parcel.started)
        except Exception as error:
            # Of any type: `tokenizers` raises no narrower one.
            output = self._fail(order, progress, parcel, error)
        outputs.append(output)
        frames += frame
        parcel.clear()

    def _fail(self, order: ShipmentOrder, progress: Progress, parcel: _Parcel, error: Exception) -> RequestOutput:
        """The last output of a request: why there is no more. The engine may still run it."""
        logger.error("%s: its output could not be made", progress.rid, exc_info=error)
        self.num_failed += 1
        parcel.detokenizer = None
        return RequestOutput(
            rid=progress.rid,
            text="",
            token_ids=[],
            prompt_tokens=parcel.started.num_prompt_tokens,
            completion_tokens=parcel.num_output,
            cached_tokens=progress.cached_tokens,
            num_retractions=progress.num_retractions,
            weight_version=parcel.last_version(order),
            dp_rank=order.dp_rank,
            finish_reason=FinishReason.failed(f"the output of this request could not be made: {error}"),
            is_at_engine=progress.finish_reason is None,
            token_weight_versions=list(parcel.versions),
        )

    @staticmethod
    def _make_output(
        order: ShipmentOrder, progress: Progress, parcel: _Parcel, detokenizer: Detokenizer
    ) -> RequestOutput:
        reason = progress.finish_reason
        text = detokenizer.push(parcel.token_ids) if reason is None else detokenizer.finish(parcel.token_ids, reason)
        first_at = None if reason is None else parcel.first_token_at
        return RequestOutput(
            rid=progress.rid,
            text=text,
            token_ids=parcel.token_ids,
            prompt_tokens=parcel.started.num_prompt_tokens,
            completion_tokens=parcel.num_output,
            cached_tokens=progress.cached_tokens,
            num_retractions=progress.num_retractions,
            weight_version=parcel.last_version(order),
            dp_rank=order.dp_rank,
            finish_reason=progress.finish_reason,
            logprobs=parcel.logprobs,
            token_weight_versions=list(parcel.versions),
            first_token_ago_s=None if first_at is None else time.perf_counter() - first_at,
        )

    def _attach_routes(
        self, output: RequestOutput, routes: Routes, started: ReqStarted
    ) -> tuple[RequestOutput, list[memoryview]]:
        """The output with its rows in a frame, behind a claim, or with the reason why they are missing. Combine weights are
        never behind a claim: who asks for both is refused."""
        if routes.rows is None:
            return msgspec.structs.replace(output, routed_experts_error=routes.error), []
        assert self.geometry is not None
        routed = encode(routes.rows.rows, routes.rows.start, self.geometry, routes.rows.weight_versions)
        if started.options.routed_experts_delivery == "inline":
            self._count(routed)
            output, frames = msgspec.structs.replace(output, routed_experts=routed.meta), [routed.frame]
            if routes.rows.weights is None:
                return output, frames
            weights = encode_weights(routes.rows.weights, routes.rows.start, self.geometry, routes.rows.weight_versions)
            self.num_bytes_shipped += weights.rows.nbytes
            return msgspec.structs.replace(output, router_weights=weights.meta), [*frames, weights.frame]
        try:
            claim = self._claims.put(routed)
        except ClaimError as error:
            return msgspec.structs.replace(output, routed_experts_error=str(error)), []
        self._count(routed)
        return msgspec.structs.replace(output, routed_experts=routed.meta, routed_experts_claim=claim), []

    def _count(self, routed: RoutedExperts) -> None:
        self.num_rows_shipped += routed.meta.rows
        self.num_bytes_shipped += routed.rows.nbytes
