"""A leader with its real model and grammars: whatever the scheduler does, outputs follow their grammar and are the same."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.replica_harness import FakeInbox, FakeSender

from waybill.engine.config import EngineConfig
from waybill.engine.grammar.grammar_text import from_json_schema, from_regex
from waybill.engine.io_struct import FinishReason, SamplingParams, StepRecord
from waybill.engine.ipc.frontend_messages import TokenizedGenerateReqInput
from waybill.engine.replica import load_rank, make_scheduler
from waybill.engine.scheduler.leader_setup import Endpoints
from waybill.parallel.mesh import ParallelMesh

CHECKPOINT = Path(__file__).parents[4] / "examples" / "tiny_moe" / "checkpoint"
EOS = 260
PATTERN = "x[0-9a-f]{10}(yes|no)"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
GRAMMARS = [from_regex(PATTERN), "", from_json_schema(json.dumps(SCHEMA)), from_regex("q{19}")]


class Leader:
    """One rank, driven until it rests."""

    def __init__(self, *, overlap_depth: int, kv_cache_tokens: int) -> None:
        config = EngineConfig(
            model_path=str(CHECKPOINT),
            tp_size=1,
            device="cpu",
            dtype="float32",
            page_size=4,
            chunked_prefill_size=8,
            kv_cache_tokens=kv_cache_tokens,
            context_length=100,
            overlap_depth=overlap_depth,
        )
        rank = load_rank(config, ParallelMesh.single(torch.device("cpu")))
        self._inbox, self._records = FakeInbox(), FakeSender()
        self.scheduler = make_scheduler(rank, Endpoints(self._inbox, [], self._records, FakeSender()))
        self._num_sent = 0

    def run(self, requests: list[SamplingParams]) -> list[tuple[list[int], FinishReason]]:
        self._records.sent.clear()
        for number, params in enumerate(requests):
            self._num_sent += 1
            text = f"start with {number}, add 2"
            ids = np.frombuffer(text.encode(), dtype=np.uint8).astype("<i4").tobytes()
            self._inbox.messages.append(TokenizedGenerateReqInput(self._num_sent, f"r{number}", ids, params))
        while not self.scheduler.is_idle or self._inbox.messages:
            self.scheduler.receive()
            while self.scheduler.queues.is_compiling:
                # So that all compete for the pages at once, whatever the machine does.
                time.sleep(0.001)
            if self.scheduler.is_awake:
                self.scheduler.step()
        found = []
        records = [one for one in self._records.sent if isinstance(one, StepRecord)]
        for number in range(len(requests)):
            outputs = [one for record in records for one in record.outputs if one.rid == f"r{number}"]
            (end,) = [one for record in records for one in record.after if one.rid == f"r{number}"]
            found.append(([token for one in outputs for token in one.token_ids], end.reason))
        return found


def asked() -> list[SamplingParams]:
    ways = [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9}, {"repetition_penalty": 1.2}]
    bias = dict.fromkeys(b" \t\n\r", -100.0)
    return [
        SamplingParams(
            max_new_tokens=22,
            sampling_seed=number,
            grammar=GRAMMARS[number % 4],
            logit_bias=bias if number % 4 == 2 else {},
            **ways[(number // 4) % 4],
        )
        for number in range(8)
    ]


@pytest.fixture(scope="module")
def leader() -> Leader:
    return Leader(overlap_depth=1, kv_cache_tokens=2000)


@pytest.fixture(scope="module")
def plenty(leader: Leader) -> list[tuple[list[int], FinishReason]]:
    return leader.run(asked())


def test_outputs_follow_their_grammars(plenty: list[tuple[list[int], FinishReason]]) -> None:
    for number, (ids, reason) in enumerate(plenty):
        text = bytes(token for token in ids if token < 256).decode()
        if number % 4 == 0:
            assert re.fullmatch(PATTERN, text) and ids[-1] == EOS and reason.type == "stop"
        elif number % 4 == 2 and reason.type == "stop":
            assert isinstance(json.loads(text)["a"], int)
        elif number % 4 == 3:
            assert text == "q" * 19 and reason.type == "stop"


@pytest.mark.parametrize("overlap_depth", [pytest.param(0, marks=pytest.mark.matrix), 1])
def test_the_same_under_retraction_and_overlap(
    plenty: list[tuple[list[int], FinishReason]], overlap_depth: int
) -> None:
    leader = Leader(overlap_depth=overlap_depth, kv_cache_tokens=104)
    assert leader.run(asked()) == plenty
    assert leader.scheduler.state()["num_retractions"] > 0, "nobody had to give way"


def test_a_grammar_begins_behind_a_token_and_wins_over_min_new_tokens(leader: Leader) -> None:
    """As behind a model's reasoning; here the token that ends it is one of a digit."""
    fields = {"max_new_tokens": 8, "temperature": 0.0, "grammar": from_regex("abc")}
    begins = SamplingParams(**fields, grammar_begins_after=ord("5"), logit_bias={ord("5"): 100.0})
    (ids, reason), (other, _) = leader.run([begins, SamplingParams(**fields, min_new_tokens=7, ignore_eos=True)])
    assert ids == [*b"5abc", EOS] and reason.type == "stop"
    assert other[:3] == [*b"abc"] and set(other[3:]) == {EOS}, "what the grammar leaves is chosen"


def test_a_grammar_that_fails_fails_its_request_alone(leader: Leader) -> None:
    bad = SamplingParams(max_new_tokens=5, grammar=from_regex("a("))
    (good, reason), (none, failure) = leader.run([SamplingParams(max_new_tokens=5, grammar=from_regex("ab")), bad])
    assert good == [*b"ab", EOS] and reason.type == "stop"
    assert none in ([], [-1]) and failure.is_failure and "the grammar cannot be compiled" in (failure.message or "")
