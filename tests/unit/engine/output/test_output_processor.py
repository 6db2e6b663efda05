"""Records in, outputs with their rows out: the order within a step, opt-in, failures that are reported and not padded."""

from __future__ import annotations

import numpy as np
import pytest
from support.output_harness import GEOMETRY, LENGTH, Engine, Mailbox, finish_at_once, int32, started

from waybill.engine.io_struct import (
    CacheFlushed,
    FinishReason,
    Logprobs,
    ReqAdmitted,
    ReqFinished,
    ReqRetracted,
    RingPlace,
    RoutingSetup,
    Segment,
    StepRecord,
    TokenOutput,
)
from waybill.engine.output.output_processor import OutputProcessor
from waybill.engine.output.output_sender import OutputSender
from waybill.engine.routing.claims import ClaimStore
from waybill.engine.routing.ring import RouteRing


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
