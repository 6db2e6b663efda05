"""What fails in the output processor: the text or rows of one request, which no other feels, or a part, which ends it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
import zmq
from support.output_harness import LENGTH, Engine, finish_at_once, int32, started

from waybill.engine.io_struct import (
    FinishReason,
    ReqAdmitted,
    ReqFinished,
    Segment,
    StepRecord,
    TokenOutput,
)
from waybill.engine.ipc.critical_thread import EXIT_PART_FAILED
from waybill.engine.ipc.lifeline import Lifeline
from waybill.engine.output.config import OutputProcessorConfig
from waybill.engine.output.detokenizer import Detokenizer

BAD_TOKEN = 13


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
