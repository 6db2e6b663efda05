"""What two output processors make of one prompt: records in on one side, rows and log-probabilities out on the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from waybill.engine.disaggregation.prompt_rows import PromptRows
from waybill.engine.disaggregation.route_client import ArrivingRoutes, RouteJob
from waybill.engine.disaggregation.route_server import OfferedRoutes
from waybill.engine.disaggregation.wire import Ended, Fetch, Routes, Welcome
from waybill.engine.io_struct import (
    FinishReason,
    Logprobs,
    OutputBatch,
    OutputOptions,
    ReqAdmitted,
    ReqFinished,
    ReqRetracted,
    ReqStarted,
    ReqTransferred,
    RequestOutput,
    RingPlace,
    RoutingSetup,
    Segment,
    StepRecord,
    TokenOutput,
    TransferSource,
)
from waybill.engine.output.output_processor import OutputProcessor
from waybill.engine.output.output_sender import OutputSender
from waybill.engine.routing.claims import ClaimStore
from waybill.engine.routing.geometry import RouteGeometry
from waybill.engine.routing.ring import RouteRing
from waybill.engine.routing.wire import decode

GEOMETRY = RouteGeometry(layer_ids=(1, 2), num_layers_total=3, max_tokens=8, top_k=2, num_experts=16)
SOURCE = TransferSource("h", 1, 5)
KEY = SOURCE.key
LENGTH = FinishReason("length", length=1)
SCORED = OutputOptions(return_logprob=True, logprob_start_len=0)
FIRST = TokenOutput("a", [9], Logprobs([-0.5]))


def int32(*numbers: int) -> bytes:
    return np.array(numbers, dtype="<i4").tobytes()


def scores(start: int, end: int) -> Logprobs:
    return Logprobs(input=[(-float(n), n) for n in range(start, end)], input_ranks=list(range(start, end)))


@dataclass
class Mailbox:
    outputs: list[RequestOutput] = field(default_factory=list)
    rows: dict[str, np.ndarray] = field(default_factory=dict)

    def send(self, batch: OutputBatch, frames: list[memoryview]) -> None:
        remaining = iter(frames)
        for output in batch.outputs:
            self.outputs.append(output)
            if output.routed_experts is not None:
                self.rows[output.rid] = decode(output.routed_experts, next(remaining)).rows


class Side:
    """An output processor with a ring and its leader's records."""

    def __init__(self, side: Any, *, routing: bool = True) -> None:
        self.mailbox = Mailbox()
        self.sender = OutputSender(self.mailbox, None, ClaimStore(1000, 10.0, lambda: 0.0))  # type: ignore[arg-type]
        self.processor = OutputProcessor(self.sender, routes_side=side)
        self.ring = RouteRing.create(GEOMETRY, 4)
        place = RingPlace(self.ring.path, 4)
        self.processor.handle(RoutingSetup(0, 16, 1, GEOMETRY, place) if routing else RoutingSetup(0, 16, 1))
        self.routing = routing
        self.num_steps = 0

    def step(self, version: str = "v", **parts: Any) -> None:
        """The row of position p is `[2 p % 16, 2 p % 16 + 1]`."""
        positions = [segment.start + i for segment in parts.get("segments", []) for i in range(segment.num_tokens)]
        seq = -1
        if positions and self.routing:
            seq = self.ring.acquire(1.0)
            self.ring.slot(seq, len(positions))[:] = np.array(positions)[None, :, None] % 8 * 2 + [0, 1]
        self.processor.handle(StepRecord(0, self.num_steps, seq, 0, version, **parts))
        self.num_steps += 1
        while not self.sender._orders.empty():
            self.sender.ship(self.sender._orders.get())


class Client:
    """In place of the sockets: asks when it is told to."""

    def __init__(self, offered: OfferedRoutes) -> None:
        self.offered = offered
        self.job: RouteJob | None = None
        self.question: Fetch | None = None
        self.spans: list[tuple[int, int]] = []
        self.dropped = 0

    def add(self, job: RouteJob) -> None:
        self.job, self.question = job, job.begin(Welcome("one", [], "there"))["there"]

    def drop(self, key: str) -> None:
        self.job, self.dropped = None, self.dropped + 1

    def pump(self) -> None:
        assert self.job is not None
        while self.question is not None:
            found = self.offered.answer(self.question)
            if found is None:
                return
            if isinstance(found[0], Routes):
                self.spans.append((found[0].start, found[0].end))
            try:
                self.question = self.job.take("there", *found)
            except ValueError as error:
                self.question = None
                self.job.finish(str(error))
                return
        self.job.finish("")


class Pair:
    def __init__(self, *, routing: bool = True) -> None:
        self.offered = OfferedRoutes()
        self.prefill = Side(self.offered, routing=routing)
        self.client = Client(self.offered)
        self.notices: list[Any] = []
        arriving = ArrivingRoutes(self.client, lambda _, notice: self.notices.append(notice))  # type: ignore[arg-type]
        self.decode = Side(arriving, routing=routing)

    def begin(self, num_prompt: int, options: OutputOptions, cached: tuple[bytes, bytes] = (b"", b"")) -> None:
        """On both sides; `cached` are the pages that each has of it."""
        for side, pages in zip((self.prefill, self.decode), cached, strict=True):
            side.step(before=[ReqStarted("a", num_prompt, options, (), SOURCE), ReqAdmitted("a", pages)])

    def go_on(self, *new_pages: int) -> RequestOutput:
        """The decode's side finishes with the first token."""
        event = ReqTransferred("a", int32(*new_pages), "v", FIRST, LENGTH)
        self.decode.step(before=[event])
        return self.decode.mailbox.outputs[-1]


@pytest.fixture
def pair() -> Pair:
    return Pair()


COMPACT = OutputOptions(return_routed_experts=True, routed_experts_format="compact")


def test_each_chunk_goes_when_it_is_filed_and_what_is_cached_at_once(pair: Pair) -> None:
    pair.prefill.step(
        "old",
        before=[ReqStarted("b", 2), ReqAdmitted("b", b"")],
        segments=[Segment("b", 0, 2, int32(3, 4))],
    )
    pair.begin(6, COMPACT, (int32(3, 4), b""))
    pair.client.pump()
    assert pair.client.spans == [(0, 2)]
    # The other request's rows are not of this prompt, nor are those of a discarded segment.
    pair.prefill.step(segments=[Segment("b", 2, 1, int32(9)), Segment("a", 2, 3, int32(5, 6, 7))])
    pair.client.pump()
    pair.prefill.step(segments=[Segment("a", 5, 1, int32(8))], outputs=[FIRST])
    assert pair.notices == []
    pair.client.pump()
    assert pair.client.spans == [(0, 2), (2, 5), (5, 6)]
    (notice,) = pair.notices
    assert (notice.key, notice.part, notice.error) == (KEY, "routes", "")
    output = pair.go_on(0, 1, 2, 3, 4, 5)
    assert output.routed_experts is not None
    assert output.routed_experts.weight_versions == [("old", 0, 2), ("v", 2, 6)]
    assert pair.decode.mailbox.rows["a"][:, 0, 0].tolist() == [0, 2, 4, 6, 8, 10]
    assert pair.decode.processor.counters()["routed_experts_rows_filed"] == 6


@pytest.mark.parametrize("routing", [True, False])
def test_log_probabilities_of_the_prompt_are_put_before_that_of_its_first_token(routing: bool) -> None:
    pair = Pair(routing=routing)
    pair.begin(5, SCORED)
    pair.prefill.step(segments=[Segment("a", 0, 3, int32(1, 2, 3))], outputs=[TokenOutput("a", [], scores(0, 3))])
    pair.client.pump()
    assert pair.client.job is not None and len(pair.client.job.scores.input) == 3
    last = scores(3, 5)
    last.output.append(-0.5)
    pair.prefill.step(segments=[Segment("a", 3, 2, int32(4, 5))], outputs=[TokenOutput("a", [9], last)])
    pair.client.pump()
    output = pair.go_on(0, 1, 2, 3, 4)
    expected = scores(0, 5)
    expected.output.append(-0.5)
    assert output.token_ids == [9] and output.logprobs == expected
    # It is kept by nobody.
    assert not pair.decode.processor._transferred._transfers


def test_without_routes_nothing_is_fetched_for_who_asks_for_no_log_probabilities() -> None:
    pair = Pair(routing=False)
    pair.begin(5, OutputOptions(return_logprob=True))
    assert pair.client.job is None
    assert pair.go_on(0, 1, 2, 3, 4).logprobs == FIRST.logprobs


def test_rows_that_were_never_filed_are_missing_there_and_here(pair: Pair) -> None:
    """The pages have no rows; the next positions' are not sent either."""
    pair.begin(4, COMPACT, (int32(11, 12), b""))
    pair.prefill.step(segments=[Segment("a", 2, 2, int32(5, 6))], outputs=[FIRST])
    pair.client.pump()
    (notice,) = pair.notices
    assert "2 rows are missing, the first at position 0" in notice.error and not notice.is_lost
    output = pair.go_on(0, 1, 2, 3)
    assert output.routed_experts is None and "4 rows are missing" in str(output.routed_experts_error)


@pytest.mark.parametrize("reason", [FinishReason("abort", message="aborted by request"), FinishReason.failed("NaN")])
def test_a_prompt_that_fails_in_its_middle(pair: Pair, reason: FinishReason) -> None:
    pair.begin(6, COMPACT)
    pair.prefill.step(segments=[Segment("a", 0, 3, int32(1, 2, 3))])
    pair.client.pump()
    pair.prefill.step(segments=[Segment("a", 3, 3, int32(4, 5, 6), discarded=True)], after=[ReqFinished("a", reason)])
    pair.client.pump()
    (notice,) = pair.notices
    assert notice.error == reason.message and notice.is_lost
    # Its buffer went with it.
    assert not pair.offered._offered and pair.client.spans == [(0, 3)]


def test_who_gives_its_pages_up_while_it_waits_fetches_again_from_what_is_cached_then(pair: Pair) -> None:
    pair.begin(4, COMPACT)
    pair.prefill.step(segments=[Segment("a", 0, 3, int32(1, 2, 3))])
    pair.client.pump()
    pair.decode.step(before=[ReqRetracted("a")])
    assert pair.client.dropped == 1
    pair.decode.step(
        "other",
        before=[ReqStarted("b", 1), ReqAdmitted("b", b""), ReqAdmitted("a", int32(15))],
        segments=[Segment("b", 0, 1, int32(15))],
    )
    pair.prefill.step(segments=[Segment("a", 3, 1, int32(4))], outputs=[FIRST])
    pair.client.spans.clear()
    pair.client.pump()
    assert pair.client.spans == [(1, 4)] and pair.notices[-1].attempt == 2
    output = pair.go_on(0, 1, 2)
    assert output.routed_experts is not None
    assert output.routed_experts.weight_versions == [("other", 0, 1), ("v", 1, 4)]


def test_cached_rows_are_offered_an_answer_at_a_time(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("waybill.engine.output.transferred_routes.ANSWER_BYTES", 3 * GEOMETRY.row_bytes)
    pages = int32(*range(8))
    pair.prefill.step(before=[ReqStarted("b", 8), ReqAdmitted("b", b"")], segments=[Segment("b", 0, 8, pages)])
    sizes: list[int] = []
    add = PromptRows.add

    def counted(rows: PromptRows, found: Any) -> None:
        sizes.append(len(found.rows))
        add(rows, found)

    monkeypatch.setattr(PromptRows, "add", counted)
    pair.prefill.step(before=[ReqStarted("a", 9, COMPACT, (), SOURCE), ReqAdmitted("a", pages)])
    assert sizes == [3, 3, 2]
    pair.prefill.step(after=[ReqFinished("a", LENGTH)])
    assert pair.client.job is None
    source = RouteJob(SOURCE, 1, PromptRows(GEOMETRY, 0, 9), 0, lambda *_: None)
    found = pair.offered.answer(source.begin(Welcome("one", [], "there"))["there"])
    assert found is not None and isinstance(found[0], Ended)
    assert found[0].error == "the prefill's side has let go of it"
