"""Records in, outputs with their rows out: the order within a step, opt-in, failures that are reported and not padded."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq

from waybill.engine.io_struct import (
    CacheFlushed,
    FinishReason,
    Logprobs,
    OutputBatch,
    OutputOptions,
    ReqAdmitted,
    ReqFinished,
    ReqRetracted,
    ReqStarted,
    RequestOutput,
    RingPlace,
    RoutingSetup,
    Segment,
    StepRecord,
    TokenOutput,
)
from waybill.engine.ipc.critical_thread import EXIT_PART_FAILED
from waybill.engine.ipc.lifeline import Lifeline
from waybill.engine.output.config import OutputProcessorConfig
from waybill.engine.output.detokenizer import Detokenizer
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


@pytest.fixture
def engine() -> Engine:
    return Engine()


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


def test_a_finished_request_gets_a_row_for_every_input(engine: Engine) -> None:
    finish_at_once(engine, "a", (0, 1, 2))
    (output,) = engine.mailbox.outputs
    assert (output.prompt_tokens, output.completion_tokens, output.token_ids) == (3, 1, [5])
    assert engine.mailbox.rows["a"][:, 0, 0].tolist() == [0, 2, 4]
    assert output.routed_experts is not None
    assert output.routed_experts.weight_versions == [("v1", 0, 3)]


def test_every_token_has_the_version_of_the_forward_that_it_was_sampled_from(engine: Engine) -> None:
    """Runs over all tokens so far, in every output of a stream; an update without a token in between leaves none."""
    engine.step(
        before=[started("a", 2, stream=True), ReqAdmitted("a", b"")],
        segments=[Segment("a", 0, 2, int32(0, 1))],
        outputs=[TokenOutput("a", [5])],
    )
    engine.step(segments=[Segment("a", 2, 1, int32(2))], outputs=[TokenOutput("a", [6, 7])])
    engine.step(version="v2")
    engine.step(version="v3", segments=[Segment("a", 3, 1, int32(3))], outputs=[TokenOutput("a", [8])])
    engine.step(version="v4", after=[ReqFinished("a", FinishReason("abort"))])
    assert [(output.weight_version, output.token_weight_versions) for output in engine.mailbox.outputs] == [
        ("v1", [("v1", 0, 1)]),
        ("v1", [("v1", 0, 3)]),
        ("v3", [("v1", 0, 3), ("v3", 3, 4)]),
        ("v3", [("v1", 0, 3), ("v3", 3, 4)]),
    ]
    engine.step(version="v4", before=[started("b", 2)], after=[ReqFinished("b", FinishReason("abort"))])
    assert engine.mailbox.outputs[-1].weight_version == "v4"
    assert engine.mailbox.outputs[-1].token_weight_versions == []


def test_the_last_output_tells_when_the_first_token_came(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """With or without a stream; not of a request that has none."""
    clock = iter(range(100))
    monkeypatch.setattr("waybill.engine.output.output_sender.time.perf_counter", lambda: float(next(clock)))
    for rid, stream in (("a", False), ("b", True)):
        engine.step(
            before=[started(rid, 2, stream=stream), ReqAdmitted(rid, b"")],
            segments=[Segment(rid, 0, 2, int32(0, 1))],
            outputs=[TokenOutput(rid, [5])],
        )
        engine.step(
            segments=[Segment(rid, 2, 1, int32(2))], outputs=[TokenOutput(rid, [6])], after=[ReqFinished(rid, LENGTH)]
        )
    engine.step(before=[started("c", 2)], after=[ReqFinished("c", FinishReason("abort"))])
    told = [(output.rid, output.first_token_ago_s) for output in engine.mailbox.outputs]
    assert told == [("a", 1.0), ("b", None), ("b", 1.0), ("c", None)]


def test_slots_freed_by_a_finish_are_reused_by_the_next_step(engine: Engine) -> None:
    finish_at_once(engine, "a", (0, 1))
    finish_at_once(engine, "b", (0, 1), first_row=4)
    assert engine.mailbox.rows["a"][:, 0, 0].tolist() == [0, 2]
    assert engine.mailbox.rows["b"][:, 0, 0].tolist() == [8, 10]


def test_nothing_is_sliced_for_those_who_did_not_ask_but_their_rows_are_filed(engine: Engine) -> None:
    finish_at_once(engine, "plain", (3, 4), return_routed_experts=False)
    counters = engine.processor.counters()
    assert (counters["routed_experts_slices"], counters["routed_experts_rows_filed"]) == (0, 2)
    assert engine.mailbox.outputs[0].routed_experts is None
    assert engine.mailbox.outputs[0].routed_experts_error is None
    engine.step(
        6,
        before=[started("b", 3), ReqAdmitted("b", int32(3, 4))],
        segments=[Segment("b", 2, 1, int32(5))],
        outputs=[TokenOutput("b", [5])],
        after=[ReqFinished("b", LENGTH)],
    )
    assert engine.mailbox.rows["b"][:, 0, 0].tolist() == [0, 2, 12]
    assert engine.mailbox.outputs[1].cached_tokens == 2


def test_discarded_rows_belong_to_nobody(engine: Engine) -> None:
    """A request that finished while its next step was in flight; its page is another's by then."""
    finish_at_once(engine, "a", (0, 1))
    engine.step(
        3,
        before=[started("b", 2), ReqAdmitted("b", b"")],
        segments=[Segment("a", 2, 1, int32(7), discarded=True), Segment("b", 0, 2, int32(0, 1))],
        outputs=[TokenOutput("b", [5])],
        after=[ReqFinished("b", LENGTH)],
    )
    assert engine.mailbox.rows["b"][:, 0, 0].tolist() == [8, 10]


def test_missing_rows_are_reported_and_the_neighbour_is_served(engine: Engine) -> None:
    finish_at_once(engine, "a", (0, 1))
    engine.step(before=[CacheFlushed()])
    engine.step(
        before=[started("bad", 3), ReqAdmitted("bad", int32(0, 1)), started("good", 1), ReqAdmitted("good", b"")],
        segments=[Segment("bad", 2, 1, int32(2)), Segment("good", 0, 1, int32(3))],
        outputs=[TokenOutput("bad", [5]), TokenOutput("good", [6])],
        after=[ReqFinished("bad", LENGTH), ReqFinished("good", LENGTH)],
    )
    bad, good = engine.mailbox.outputs[1:]
    assert bad.routed_experts is None and bad.routed_experts_error is not None
    assert "bad: 2 rows are missing" in bad.routed_experts_error
    assert good.routed_experts is not None and good.routed_experts_error is None
    assert engine.processor.counters()["routed_experts_refused"] == 1


def test_an_abort_gets_the_rows_it_has(engine: Engine) -> None:
    """In the queue, running, and retracted."""
    abort = FinishReason("abort", message="aborted")
    engine.step(before=[started("queued", 4)], after=[ReqFinished("queued", abort)])
    assert engine.mailbox.rows["queued"].shape == (0, 2, 2)
    engine.step(
        before=[started("chunk", 4), ReqAdmitted("chunk", b"")],
        segments=[Segment("chunk", 0, 2, int32(0, 1))],
        after=[ReqFinished("chunk", abort)],
    )
    assert len(engine.mailbox.rows["chunk"]) == 2
    engine.step(
        before=[started("back", 2), ReqAdmitted("back", b"")],
        segments=[Segment("back", 0, 2, int32(2, 3))],
        outputs=[TokenOutput("back", [5])],
    )
    engine.step(before=[ReqRetracted("back")], after=[ReqFinished("back", abort)])
    assert len(engine.mailbox.rows["back"]) == 2
    assert engine.mailbox.outputs[-1].num_retractions == 1
    assert engine.mailbox.outputs[-1].token_ids == [5]


@pytest.mark.parametrize("delivery", ["inline", "reference"])
@pytest.mark.parametrize("stage", ["queued", "prefill", "retracted in its prefill"])
def test_an_abort_before_the_first_token_has_no_rows_in_int32(engine: Engine, stage: str, delivery: str) -> None:
    abort = FinishReason("abort", message="aborted")
    fields = {"routed_experts_format": "int32", "routed_experts_delivery": delivery}
    before: list[object] = [started("a", 4, **fields)]
    if stage == "queued":
        engine.step(before=before, after=[ReqFinished("a", abort)])
    else:
        segments = [Segment("a", 0, 2, int32(0, 1))]
        engine.step(before=[*before, ReqAdmitted("a", b"")], segments=segments)
        engine.step(before=[ReqRetracted("a")] if "retracted" in stage else [], after=[ReqFinished("a", abort)])
    (output,) = engine.mailbox.outputs
    assert output.routed_experts is None and output.routed_experts_error is None
    assert output.routed_experts_claim is None and not engine.mailbox.rows
    assert engine.processor.counters()["routed_experts_rows_shipped"] == 0


def test_an_abort_after_a_token_has_its_rows_in_int32(engine: Engine) -> None:
    engine.step(
        before=[started("a", 2, routed_experts_format="int32"), ReqAdmitted("a", b"")],
        segments=[Segment("a", 0, 2, int32(0, 1))],
        outputs=[TokenOutput("a", [5])],
    )
    engine.step(after=[ReqFinished("a", FinishReason("abort", message="aborted"))])
    assert len(engine.mailbox.rows["a"]) == 2


@pytest.mark.parametrize("form", ["int32", "compact"])
@pytest.mark.parametrize("start", [0, 2, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_a_prefill_alone_has_the_row_of_its_last_token_in_compact_form(
    engine: Engine, form: str, start: int, stream: bool
) -> None:
    fields = {"stream": stream, "stream_routed_experts": stream, "routed_experts_start_len": start}
    engine.step(
        before=[started("a", 3, routed_experts_format=form, **fields), ReqAdmitted("a", b"")],
        segments=[Segment("a", 0, 3, int32(0, 1, 2))],
        after=[ReqFinished("a", FinishReason("length", length=0))],
    )
    (output,) = engine.mailbox.outputs
    end = 3 if form == "compact" else 2
    assert output.routed_experts is not None
    assert output.routed_experts.start == min(start, end)
    assert output.routed_experts.rows == max(0, end - start)
    assert engine.mailbox.rows["a"][:, 0, 0].tolist() == [0, 2, 4][start:end]


def test_a_claim_stands_for_the_rows(engine: Engine) -> None:
    finish_at_once(engine, "a", (0, 1), routed_experts_delivery="reference")
    (output,) = engine.mailbox.outputs
    assert output.routed_experts_claim is not None and "a" not in engine.mailbox.rows
    assert engine.claims.get(output.routed_experts_claim).rows[:, 0, 0].tolist() == [0, 2]


def test_rows_beyond_the_claim_budget_are_refused_with_the_reason() -> None:
    engine = Engine(claim_budget=3)
    finish_at_once(engine, "a", (0, 1), routed_experts_delivery="reference")
    (output,) = engine.mailbox.outputs
    assert output.routed_experts is None and "claim_budget_bytes=3" in str(output.routed_experts_error)


def test_a_stream_gets_its_tokens_as_they_come_and_its_rows_at_the_end(engine: Engine) -> None:
    engine.step(
        before=[started("s", 1, stream=True), ReqAdmitted("s", b"")],
        segments=[Segment("s", 0, 1, int32(0))],
        outputs=[TokenOutput("s", [5])],
    )
    engine.step(
        1,
        segments=[Segment("s", 1, 1, int32(1))],
        outputs=[TokenOutput("s", [6])],
        after=[ReqFinished("s", LENGTH)],
    )
    first, last = engine.mailbox.outputs
    assert (first.token_ids, first.finish_reason, last.token_ids) == ([5], None, [6])
    assert engine.mailbox.rows["s"][:, 0, 0].tolist() == [0, 2]


@pytest.mark.parametrize("stream", [True, False])
def test_log_probabilities_pile_up_until_their_output_leaves_and_others_have_none(engine: Engine, stream: bool) -> None:
    parts = [Logprobs(input=[(None, 3), (-1.0, 4)]), Logprobs([-2.0], [[(-2.0, 5)]]), Logprobs([-3.0], [[(-3.0, 6)]])]
    engine.step(
        before=[
            *(started(rid, 2, stream=stream, return_routed_experts=False) for rid in ("asks", "other")),
            *(ReqAdmitted(rid, b"") for rid in ("asks", "other")),
        ],
        outputs=[TokenOutput("asks", [], parts[0])],
    )
    engine.step(outputs=[TokenOutput("asks", [5], parts[1]), TokenOutput("other", [5])])
    engine.step(
        outputs=[TokenOutput("asks", [6], parts[2]), TokenOutput("other", [6])],
        after=[ReqFinished("asks", LENGTH), ReqFinished("other", LENGTH)],
    )
    shipped = [output.logprobs for output in engine.mailbox.outputs if output.rid == "asks"]
    first = Logprobs([-2.0], [[(-2.0, 5)]], [(None, 3), (-1.0, 4)])
    last = Logprobs([-3.0], [[(-3.0, 6)]])
    whole = Logprobs([-2.0, -3.0], [[(-2.0, 5)], [(-3.0, 6)]], first.input)
    assert shipped == ([first, last] if stream else [whole])
    assert {output.logprobs for output in engine.mailbox.outputs if output.rid == "other"} == {None}
    assert parts[1] == Logprobs([-2.0], [[(-2.0, 5)]]), "a record stays as it is"


def test_without_routing_nothing_is_allocated_and_outputs_flow() -> None:
    engine = Engine(routing=False)
    finish_at_once(engine, "a", (0, 1), return_routed_experts=False)
    assert engine.mailbox.outputs[0].token_ids == [5]
    assert not engine.processor._ledgers


def test_the_output_processor_of_a_node_serves_its_own_dp_ranks() -> None:
    """Those are 2 and 3; the rows of 3 stand behind those of 2, and wait until 2 has said that they are there."""
    mailbox = Mailbox()
    output_sender = OutputSender(mailbox, None, ClaimStore(1000, 10.0, lambda: 0.0))
    processor = OutputProcessor(output_sender, 2, first_dp_rank=2)
    ring = RouteRing.create(GEOMETRY, 4)
    for dp_rank, place in ((2, RingPlace(ring.path, 4)), (3, None)):
        processor.handle(RoutingSetup(dp_rank, 16, 1, GEOMETRY, place))
    seq = ring.acquire(1.0)
    ring.slot(seq, 4)[:] = np.arange(4)[None, :, None] * 2 + [0, 1]
    for dp_rank in (3, 2):
        rid = f"of {dp_rank}"
        step = StepRecord(
            dp_rank,
            0,
            seq,
            (dp_rank - 2) * 2,
            "v1",
            before=[started(rid, 2), ReqAdmitted(rid, b"")],
            segments=[Segment(rid, 0, 2, int32(0, 1))],
            outputs=[TokenOutput(rid, [5])],
            after=[ReqFinished(rid, LENGTH)],
        )
        processor.handle(step)
        assert ring.num_filed == int(dp_rank == 2)
    while not output_sender._orders.empty():
        output_sender.ship(output_sender._orders.get())
    assert {rid: rows[:, 0, 0].tolist() for rid, rows in mailbox.rows.items()} == {"of 2": [0, 2], "of 3": [4, 6]}


class BrokenDetokenizer(Detokenizer):
    """Fails on one token, as a decoder of `tokenizers` may: with an exception of no narrower type."""

    def push(self, token_ids: Sequence[int]) -> str:
        if BAD_TOKEN in token_ids:
            raise Exception("Invalid prefix encountered")
        return super().push(token_ids)

    def finish(self, token_ids: Sequence[int], reason: FinishReason) -> str:
        if BAD_TOKEN in token_ids:
            raise Exception("Invalid prefix encountered")
        return super().finish(token_ids, reason)


BAD_TOKEN = 13


def test_a_request_whose_text_cannot_be_made_fails_and_no_other(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told once; what the engine computes until it has aborted the request is dropped, and its rid is free again."""
    monkeypatch.setattr("waybill.engine.output.output_sender.Detokenizer", BrokenDetokenizer)
    engine.step(
        before=[
            event
            for rid in ("bad", "good")
            for event in (started(rid, 1, stream=True, return_routed_experts=False), ReqAdmitted(rid, b""))
        ],
        segments=[Segment("bad", 0, 1, int32(0)), Segment("good", 0, 1, int32(1))],
        outputs=[TokenOutput("bad", [BAD_TOKEN]), TokenOutput("good", [6])],
    )
    bad, good = engine.mailbox.outputs
    assert bad.finish_reason is not None and bad.finish_reason.type == "abort" and bad.finish_reason.status_code == 500
    assert "Invalid prefix encountered" in str(bad.finish_reason.message)
    assert bad.is_at_engine, "whoever reads this tells the engine"
    assert (good.token_ids, good.finish_reason) == ([6], None)
    engine.step(
        2,
        segments=[Segment("bad", 1, 1, int32(2)), Segment("good", 1, 1, int32(3))],
        outputs=[TokenOutput("bad", [7]), TokenOutput("good", [7])],
    )
    assert engine.mailbox.left == []
    engine.step(after=[ReqFinished("bad", FinishReason("abort", message="aborted by request"))])
    assert engine.mailbox.left == ["bad"]
    assert [output.rid for output in engine.mailbox.outputs[2:]] == ["good"], "nothing more of the one that failed"
    assert engine.processor.counters()["outputs_failed"] == 1
    finish_at_once(engine, "bad", (4, 5))
    assert engine.mailbox.outputs[-1].finish_reason == LENGTH


def test_a_request_that_fails_with_its_last_token_is_not_at_the_engine(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("waybill.engine.output.output_sender.Detokenizer", BrokenDetokenizer)
    engine.step(
        before=[started("bad", 1), ReqAdmitted("bad", b"")],
        segments=[Segment("bad", 0, 1, int32(0))],
        outputs=[TokenOutput("bad", [BAD_TOKEN])],
        after=[ReqFinished("bad", LENGTH)],
    )
    (output,) = engine.mailbox.outputs
    assert output.finish_reason is not None and output.finish_reason.status_code == 500
    assert not output.is_at_engine and output.routed_experts is None and not engine.mailbox.rows


def test_rows_that_cannot_be_wrapped_fail_their_request_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    finish_at_once(engine, "before", (0,))
    monkeypatch.setattr("waybill.engine.output.output_sender.encode", fail)
    finish_at_once(engine, "bad", (1,))
    finish_at_once(engine, "plain", (2,), return_routed_experts=False)
    assert [output.finish_reason.type for output in engine.mailbox.outputs if output.finish_reason] == [
        "length",
        "abort",
        "length",
    ]


PROCESSOR = """
import sys
from waybill.engine.output import output_processor
from waybill.engine.output import output_sender
if sys.argv[3] == "output_sender":
    def fail(self, order): raise KeyError("order")
    output_sender.OutputSender.ship = fail
if sys.argv[3] == "queries":
    def fail(self, frames): raise KeyError("frames")
    output_processor.QueryServer.answer = fail
sys.argv = ["", *sys.argv[1:3]]
output_processor.main()
"""


@pytest.mark.parametrize("part", ["filing", "malformed", "output_sender", "queries"])
def test_a_part_that_fails_ends_the_process(part: str, tmp_path: Path) -> None:
    """So that the rank that started it, and with it everybody, hears of it; and it says why."""
    lifeline = Lifeline(str(tmp_path / "alive"))
    config = OutputProcessorConfig(
        records_address=f"ipc://{tmp_path}/records",
        frontend_address=f"ipc://{tmp_path}/frontend",
        queries_address=f"ipc://{tmp_path}/queries",
        tokenizer_path=str(tmp_path),
        lifeline_path=lifeline.path,
        claim_budget_bytes=1000,
        claim_ttl_s=1.0,
    )
    file = tmp_path / "config.json"
    file.write_bytes(msgspec.json.encode(config))
    child = subprocess.Popen(
        [sys.executable, "-c", PROCESSOR, "--config", str(file), part], stderr=subprocess.PIPE, text=True
    )
    context = zmq.Context()
    socket = context.socket(zmq.DEALER if part == "queries" else zmq.PUSH)
    socket.connect(config.queries_address if part == "queries" else config.records_address)
    record = StepRecord(0, 0, -1, 0, "v", before=[started("a", 1, return_routed_experts=False)])
    if part == "filing":
        # Of a request that nobody has started.
        record = msgspec.structs.replace(record, before=[], outputs=[TokenOutput("unknown", [1])])
    socket.send(b"\xc1 no message" if part == "malformed" else msgspec.msgpack.encode(record))
    try:
        _, errors = child.communicate(timeout=60)
    finally:
        child.kill()
        socket.close(linger=0)
        context.term()
        lifeline.cut()
    assert child.returncode == EXIT_PART_FAILED, errors
    assert {"filing": "unknown", "malformed": "a malformed message of 12 bytes"}.get(part, "has failed") in errors
