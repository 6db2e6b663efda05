"""One rank with its real model in this process: NaN in the weights of an expert, which some requests meet, others not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from support.replica_harness import FakeInbox, FakeSender

from waybill.engine.config import EngineConfig
from waybill.engine.control.operations import FlushCache
from waybill.engine.io_struct import FinishReason, Logprobs, OutputOptions, SamplingParams
from waybill.engine.ipc.frontend_messages import ControlReq, TokenizedGenerateReqInput
from waybill.engine.models.moe_block import MoeBlock
from waybill.engine.replica import load_rank, make_scheduler
from waybill.engine.scheduler.leader_setup import Endpoints
from waybill.parallel.mesh import ParallelMesh

CHECKPOINT = Path(__file__).parents[4] / "examples" / "tiny_moe" / "checkpoint"
# Followed by layers that keep what it gives, as keys and values.
LAYER = 3
TEXTS = ("start with 12", "a longer prompt, add 30 and so on", "x", "add 21", "what now, 7?", "start with 12, add 8")
WAYS = [
    {"temperature": 0.0},
    {"temperature": 1.0, "sampling_seed": 3},
    {"temperature": 0.7, "top_p": 0.9, "sampling_seed": 4},
]

Result = tuple[list[int], FinishReason, list[float | None]]


class Leader:
    """A leader of one rank, driven until it rests."""

    def __init__(self, device: str, overlap_depth: int) -> None:
        config = EngineConfig(
            model_path=str(CHECKPOINT),
            tp_size=1,
            device=device,
            dtype="float32",
            page_size=4,
            chunked_prefill_size=8,
            kv_cache_tokens=800,
            context_length=100,
            overlap_depth=overlap_depth,
        )
        self._rank = load_rank(config, ParallelMesh.single(torch.device(device)))
        self._inbox, self._records = FakeInbox(), FakeSender()
        self.scheduler = make_scheduler(self._rank, Endpoints(self._inbox, [], self._records, FakeSender()))
        self._num_sent = 0

    def run(self, texts: tuple[str, ...] = TEXTS, *, logprob_start_len: int = -1, max_new: int = 8) -> list[Result]:
        self._records.sent.clear()
        options = OutputOptions(return_logprob=True, logprob_start_len=logprob_start_len)
        for i, text in enumerate(texts):
            self._num_sent += 1
            ids = np.frombuffer(text.encode(), dtype=np.uint8).astype("<i4").tobytes()
            params = SamplingParams(max_new_tokens=max_new, ignore_eos=True, **WAYS[i % len(WAYS)])
            self._inbox.messages.append(TokenizedGenerateReqInput(self._num_sent, f"r{i}", ids, params, options))
        self._rest()
        return [self._read(f"r{i}") for i in range(len(texts))]

    def _rest(self) -> None:
        while not self.scheduler.is_idle or self._inbox.messages:
            self.scheduler.receive()
            if self.scheduler.is_awake:
                self.scheduler.step()
        self.scheduler.state()  # checks that no page is lost

    def _read(self, rid: str) -> Result:
        outputs = [output for record in self._records.sent for output in record.outputs if output.rid == rid]
        (reason,) = (done.reason for record in self._records.sent for done in record.after if done.rid == rid)
        ids = [token for output in outputs for token in output.token_ids]
        logprobs = Logprobs()
        for output in outputs:
            assert output.logprobs is not None
            logprobs.extend(output.logprobs)
        return ids, reason, [*(value for value, _ in logprobs.input), *logprobs.output]

    @contextmanager
    def nan_expert(self, expert: int, *, keep_cache: bool = False) -> Iterator[None]:
        layer = self._rank.runner.model.decoder_layers()[LAYER].mlp
        assert isinstance(layer, MoeBlock)
        down = layer.experts.down.data[expert]
        good = down.clone()
        self.flush()
        down.fill_(float("nan"))
        yield
        down.copy_(good)
        if not keep_cache:
            self.flush()

    def flush(self) -> None:
        self._num_sent += 1
        self._inbox.messages.append(ControlReq(self._num_sent, "flush", FlushCache()))
        self._rest()


PLACES = [
    ("cpu", 0),
    ("cpu", 1),
    pytest.param(("cuda", 0), marks=pytest.mark.gpu),
    pytest.param(("cuda", 1), marks=pytest.mark.gpu),
]


@pytest.fixture(scope="module", params=PLACES, ids=str)
def leader(request: pytest.FixtureRequest) -> Leader:
    return Leader(*request.param)


def failed(result: Result) -> bool:
    return result[1].status_code == 500


def find_expert(leader: Leader) -> tuple[int, list[Result]]:
    """One that some requests meet and some do not, and what comes out then."""
    for expert in range(16):
        with leader.nan_expert(expert):
            results = leader.run()
        if 1 < sum(map(failed, results)) < len(results) - 1:
            return expert, results
    raise AssertionError("no expert tells requests apart")


def test_a_request_fails_alone(leader: Leader) -> None:
    before = leader.run()
    assert not any(map(failed, before))
    expert, results = find_expert(leader)
    for result, good in zip(results, before, strict=True):
        if failed(result):
            num = len(result[0])
            assert result[0] == good[0][:num]
            assert num < len(good[0])
        else:
            assert result[0] == good[0]
            torch.testing.assert_close(torch.tensor(result[2]), torch.tensor(good[2]), rtol=1e-3, atol=1e-4)
    # Its pages go to others, and what the cache kept of it is whole.
    with leader.nan_expert(expert, keep_cache=True):
        leader.run()
    assert [result[0] for result in leader.run()] == [result[0] for result in before]


def test_scored_prompts_and_prefills_alone_fail_too(leader: Leader) -> None:
    """Chunks that sample nothing, and prompts whose log-probabilities were asked for."""
    expert, generated = find_expert(leader)
    in_prompt = [failed(result) and not result[0] for result in generated]
    assert any(in_prompt)
    with leader.nan_expert(expert):
        prefilled = leader.run(max_new=0)
        leader.flush()
        scored = leader.run(max_new=0, logprob_start_len=0)
    assert [failed(result) for result in prefilled] == in_prompt
    assert [failed(result) for result in scored] == in_prompt
    for result in scored:
        values = [value for value in result[2] if value is not None]
        assert np.isfinite(values).all()
