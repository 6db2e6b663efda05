"""The shipping half of the output processor: text, envelopes and sockets, on a thread of its own.

It receives what the filing thread has cut out already, and never touches the ledger.
"""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass, field

import msgspec

from .detokenizer import Detokenizer
from .io_struct import (
    FinishReason,
    OutputBatch,
    ReqStarted,
    RequestOutput,
    TokenOutput,
    TopLogprobs,
)
from .routing.claims import ClaimError, ClaimStore
from .routing.ledger import RouteSlice
from .routing.ring import RouteGeometry
from .routing.wire import RoutedExperts, encode
from .sockets import Sender
from .token_decoder import TokenDecoder


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
    detokenizer: Detokenizer
    num_output: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    input_logprobs: list[tuple[float | None, int]] = field(default_factory=list)
    input_top_logprobs: list[TopLogprobs | None] = field(default_factory=list)

    def add(self, output: TokenOutput) -> None:
        self.num_output += len(output.token_ids)
        self.token_ids += output.token_ids
        if output.logprobs or output.input_logprobs:
            self.logprobs += output.logprobs
            self.top_logprobs += output.top_logprobs
            self.input_logprobs += output.input_logprobs
            self.input_top_logprobs += output.input_top_logprobs

    def clear(self) -> None:
        self.token_ids, self.logprobs, self.top_logprobs = [], [], []
        self.input_logprobs, self.input_top_logprobs = [], []


class Shipper:
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

    def submit(self, order: ShipmentOrder) -> None:
        """Called by the filing thread; never blocks."""
        self._orders.put(order)

    def start(self) -> None:
        threading.Thread(target=self.run, name="shipper", daemon=True).start()

    def run(self) -> None:
        while True:
            self.ship(self._orders.get())

    def ship(self, order: ShipmentOrder) -> None:
        """Detokenise, encode and send one step's outputs as one message."""
        for started in order.started:
            self._parcels[started.rid] = _Parcel(started, self._make_detokenizer(started))
        outputs: list[RequestOutput] = []
        frames: list[memoryview] = []
        for progress in order.progress:
            parcel = self._parcels[progress.rid]
            if progress.output is not None:
                parcel.add(progress.output)
            if progress.finish_reason is None and not (parcel.started.stream and parcel.token_ids):
                continue
            output = self._make_output(order, progress, parcel)
            if progress.routes is not None:
                output, frame = self._attach_routes(output, progress.routes, parcel.started)
                frames += frame
            outputs.append(output)
            parcel.clear()
            if progress.finish_reason is not None:
                del self._parcels[progress.rid]
        if outputs:
            self._sender.send(OutputBatch(outputs), frames)

    def _make_detokenizer(self, started: ReqStarted) -> Detokenizer:
        return Detokenizer(
            self._decoder,
            skip_special_tokens=started.skip_special_tokens,
            no_stop_trim=started.no_stop_trim,
            stop=started.stop,
        )

    @staticmethod
    def _make_output(order: ShipmentOrder, progress: Progress, parcel: _Parcel) -> RequestOutput:
        detokenizer, reason = parcel.detokenizer, progress.finish_reason
        text = detokenizer.push(parcel.token_ids) if reason is None else detokenizer.finish(parcel.token_ids, reason)
        return RequestOutput(
            rid=progress.rid,
            text=text,
            token_ids=parcel.token_ids,
            prompt_tokens=parcel.started.num_prompt_tokens,
            completion_tokens=parcel.num_output,
            cached_tokens=progress.cached_tokens,
            num_retractions=progress.num_retractions,
            weight_version=order.weight_version,
            dp_rank=order.dp_rank,
            finish_reason=progress.finish_reason,
            output_logprobs=parcel.logprobs,
            output_top_logprobs=parcel.top_logprobs,
            input_logprobs=parcel.input_logprobs,
            input_top_logprobs=parcel.input_top_logprobs,
        )

    def _attach_routes(
        self, output: RequestOutput, routes: Routes, started: ReqStarted
    ) -> tuple[RequestOutput, list[memoryview]]:
        """The output with its rows in a frame, behind a claim, or with the reason why they are missing."""
        if routes.rows is None:
            return msgspec.structs.replace(output, routed_experts_error=routes.error), []
        assert self.geometry is not None
        routed = encode(routes.rows.rows, routes.rows.start, self.geometry, routes.rows.weight_versions)
        if started.routed_experts_delivery == "inline":
            self._count(routed)
            return msgspec.structs.replace(output, routed_experts=routed.meta), [routed.frame]
        try:
            claim = self._claims.put(routed)
        except ClaimError as error:
            return msgspec.structs.replace(output, routed_experts_error=str(error)), []
        self._count(routed)
        return msgspec.structs.replace(output, routed_experts=routed.meta, routed_experts_claim=claim), []

    def _count(self, routed: RoutedExperts) -> None:
        self.num_rows_shipped += routed.meta.rows
        self.num_bytes_shipped += routed.rows.nbytes
