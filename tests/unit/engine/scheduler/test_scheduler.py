"""The scheduler over a model-free runner: outputs, pages and records under every kind of pressure."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.replica_harness import EOS, Replica, expected_output

from waybill.engine.config import EngineConfig
from waybill.engine.control.operations import FlushCache
from waybill.engine.io_struct import FinishReason, Logprobs, OutputOptions, SamplingParams
from waybill.engine.ipc.frontend_messages import AbortReq, ControlReply, ControlReq
from waybill.engine.scheduler.req import Req
from waybill.engine.scheduler.stop_checker import StopChecker
from waybill.engine.text.decoder_stages import DecoderError


def make_config(**fields: object) -> EngineConfig:
    defaults: dict[str, object] = {"model_path": "", "page_size": 4, "max_running_requests": 4, "overlap_depth": 1}
    return EngineConfig(**(defaults | fields))


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("chunk", [1, 7, 64, -1])
@pytest.mark.parametrize("cache", [True, False])
def test_outputs_follow_the_rule(depth: int, chunk: int, cache: bool) -> None:
    config = make_config(overlap_depth=depth, chunked_prefill_size=chunk, enable_prefix_cache=cache)
    replica = Replica(config, num_pages=200, context_length=256)
    prompts = {f"r{i}": [(i * 5 + j) % 49 + 1 for j in range(1 + 9 * i)] for i in range(8)}
    for rid, prompt in prompts.items():
        replica.submit(rid, prompt, SamplingParams(max_new_tokens=20))
    replica.run_until_idle()
    for rid, prompt in prompts.items():
        output = expected_output(prompt, 20)
        assert replica.outputs[rid] == output
        assert replica.num_rows[rid] == len(prompt) + len(output) - 1
        reason = replica.finished[rid].reason
        assert reason.type == ("stop" if output[-1] == EOS else "length")


def test_prefix_hit_covers_whole_pages_and_leaves_one_token() -> None:
    replica = Replica(make_config(), num_pages=64)
    prompt = list(range(1, 17))
    for turn in range(2):
        replica.submit(f"r{turn}", prompt, SamplingParams(max_new_tokens=1))
        replica.run_until_idle()
    # 16 tokens are four whole pages; the last token has to be computed, so three pages are hit.
    assert replica.cached == {"r0": 0, "r1": 12}


@pytest.mark.parametrize("num_top", [0, 2])
def test_only_who_asks_has_log_probabilities_in_the_records(num_top: int) -> None:
    replica = Replica(make_config(), num_pages=64)
    options = OutputOptions(return_logprob=True, top_logprobs_num=num_top)
    replica.submit("asks", [1, 2, 3], SamplingParams(max_new_tokens=3, ignore_eos=True), output_options=options)
    replica.submit("other", [1, 2, 3], SamplingParams(max_new_tokens=3, ignore_eos=True))
    replica.run_until_idle()
    outputs = [output for record in replica.records.sent for output in record.outputs]
    asked = Logprobs([0.0], [[]]) if num_top else Logprobs([0.0])
    assert [output.logprobs for output in outputs if output.rid == "asks"] == [asked] * 3
    assert [output.logprobs for output in outputs if output.rid == "other"] == [None] * 3


def test_extra_key_partitions_the_cache() -> None:
    replica = Replica(make_config(), num_pages=64)
    prompt = list(range(1, 17))
    for rid, key in (("a", "x"), ("b", "y"), ("c", "x")):
        replica.submit(rid, prompt, SamplingParams(max_new_tokens=1), extra_key=key)
        replica.run_until_idle()
    assert replica.cached == {"a": 0, "b": 0, "c": 12}


@pytest.mark.parametrize("depth", [0, 1])
def test_retraction_keeps_outputs_and_leaks_nothing(depth: int) -> None:
    replica = Replica(make_config(overlap_depth=depth), num_pages=12)
    prompts = {f"r{i}": [i + 1] * 6 for i in range(4)}
    for rid, prompt in prompts.items():
        replica.submit(rid, prompt, SamplingParams(max_new_tokens=20, ignore_eos=True))
    replica.run_until_idle()
    assert replica.retracted, "the pool was meant to run out"
    for rid, prompt in prompts.items():
        assert replica.outputs[rid] == expected_output(prompt, 20, ignore_eos=True)
        assert replica.num_rows[rid] == 25


def test_oldest_request_is_never_retracted() -> None:
    replica = Replica(make_config(), num_pages=12)
    for i in range(4):
        replica.submit(f"r{i}", [i + 1] * 6, SamplingParams(max_new_tokens=20, ignore_eos=True))
    replica.run_until_idle()
    assert "r0" not in replica.retracted


def test_priority_goes_first() -> None:
    replica = Replica(make_config(max_running_requests=1, overlap_depth=0), num_pages=64)
    for rid, priority in (("low", 0), ("high", 5), ("middle", 1)):
        replica.submit(rid, [1, 2, 3], SamplingParams(max_new_tokens=3, ignore_eos=True), priority=priority)
    replica.run_until_idle()
    assert list(replica.finished) == ["high", "middle", "low"]


@pytest.mark.parametrize("turns", range(6))
def test_abort_in_any_state_frees_everything(turns: int) -> None:
    replica = Replica(make_config(max_running_requests=2, chunked_prefill_size=4), num_pages=64)
    for i in range(4):
        replica.submit(f"r{i}", list(range(1, 14)), SamplingParams(max_new_tokens=30, ignore_eos=True))
    for _ in range(turns):
        replica.turn()
    replica.send(lambda number: AbortReq(number, abort_all=True))
    replica.run_until_idle()
    assert {finished.reason.type for finished in replica.finished.values()} <= {"abort"}
    assert len(replica.finished) == 4


def test_abort_takes_a_prefix_and_spares_the_rest() -> None:
    replica = Replica(make_config(), num_pages=64)
    for rid in ("a1", "a2", "b1"):
        replica.submit(rid, [1, 2, 3], SamplingParams(max_new_tokens=8, ignore_eos=True))
    replica.turn()
    replica.send(lambda number: AbortReq(number, rid="a"))
    replica.send(lambda number: AbortReq(number, rid=""))
    replica.run_until_idle()
    assert {rid: finished.reason.type for rid, finished in replica.finished.items()} == {
        "a1": "abort",
        "a2": "abort",
        "b1": "length",
    }


def test_flush_is_refused_while_a_request_runs() -> None:
    replica = Replica(make_config(), num_pages=64)
    replica.submit("r", list(range(1, 17)), SamplingParams(max_new_tokens=3, ignore_eos=True))
    replica.turn()
    replica.send(lambda number: ControlReq(number, "early", FlushCache()))
    replica.run_until_idle()
    replica.send(lambda number: ControlReq(number, "late", FlushCache()))
    replica.run_until_idle()
    replies = {reply.op_id: reply.success for reply in replica.frontend.sent if isinstance(reply, ControlReply)}
    assert replies == {"early": False, "late": True}
    assert replica.pages.pool.num_free == 64


def test_prefill_only_request_computes_the_prompt_and_no_token() -> None:
    replica = Replica(make_config(chunked_prefill_size=4), num_pages=64)
    replica.submit("r", list(range(1, 12)), SamplingParams(max_new_tokens=0))
    replica.run_until_idle()
    assert replica.outputs["r"] == []
    assert replica.num_rows["r"] == 11
    assert replica.finished["r"].reason.length == 0


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("position", [0, 5, 12, 13, 15, 16, 20])
def test_a_request_that_fails_takes_nothing_with_it(depth: int, position: int) -> None:
    """In any chunk of its prefill and at any decode; another request has the same prompt, and gets the pages next."""
    replica = Replica(make_config(overlap_depth=depth, chunked_prefill_size=8), num_pages=24)
    prompt = list(range(1, 14))
    long = SamplingParams(max_new_tokens=20, ignore_eos=True)
    replica.runner.fail_at["bad"] = position
    replica.submit("bad", prompt, long)
    replica.submit("other", prompt[::-1], long)
    replica.run_until_idle()
    reason = replica.finished["bad"].reason
    assert (reason.type, reason.status_code) == ("abort", 500)
    # The step that computed the position yielded no token.
    assert replica.outputs["bad"] == expected_output(prompt, 20, ignore_eos=True)[: max(0, position - len(prompt) + 1)]
    # Its rows end before that step.
    assert replica.num_rows["bad"] == (position if position >= len(prompt) else position // 8 * 8)
    for turn in range(3):
        replica.submit(f"same {turn}", prompt + replica.outputs["bad"], long)
        replica.submit(f"next {turn}", [turn + 1] * 30, long)
    replica.run_until_idle()
    for rid, tokens in (("other", prompt[::-1]), ("same 0", prompt + replica.outputs["bad"]), ("next 2", [3] * 30)):
        assert replica.finished[rid].reason.type == "length"
        assert replica.outputs[rid] == expected_output(tokens, 20, ignore_eos=True)


def test_a_prefill_only_request_can_fail() -> None:
    replica = Replica(make_config(), num_pages=24)
    replica.runner.fail_at["bad"] = 3
    replica.submit("bad", [1, 2, 3, 4, 5], SamplingParams(max_new_tokens=0))
    replica.run_until_idle()
    assert replica.finished["bad"].reason.status_code == 500
    assert replica.pages.pool.num_free == 24, "no page of it is cached"


@settings(max_examples=60, deadline=None)
@given(
    arrivals=st.lists(
        st.tuples(st.integers(0, 6), st.integers(1, 40), st.integers(0, 12), st.integers(0, 3)), min_size=1, max_size=12
    ),
    aborts=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 11)), max_size=3),
    chunk=st.sampled_from([1, 3, 8, -1]),
    depth=st.integers(0, 1),
    num_pages=st.integers(14, 40),
)
def test_any_arrival_pattern(
    arrivals: list[tuple[int, int, int, int]], aborts: list[tuple[int, int]], chunk: int, depth: int, num_pages: int
) -> None:
    """Requests share prefixes, arrive at random, are aborted at random, and the pool is small."""
    config = make_config(chunked_prefill_size=chunk, overlap_depth=depth)
    replica = Replica(config, num_pages, context_length=56)
    prompts: dict[str, tuple[list[int], int]] = {}
    schedule = sorted((gap * 3, index) for index, (gap, *_) in enumerate(arrivals))
    for turn in range(60):
        while schedule and schedule[0][0] <= turn:
            _, index = schedule.pop(0)
            _, length, max_new, family = arrivals[index]
            prompt = [family + 1] * (length // 2) + [index + 1] * (length - length // 2)
            prompts[f"r{index}."] = (prompt, max_new)
            replica.submit(f"r{index}.", prompt, SamplingParams(max_new_tokens=max_new))
        for when, target in aborts:
            if when == turn:
                replica.send(lambda number, rid=f"r{target}.": AbortReq(number, rid=rid))
        replica.turn()
    replica.run_until_idle()
    assert replica.finished.keys() == prompts.keys()
    for rid, (prompt, max_new) in prompts.items():
        expected = expected_output(prompt, max_new)
        if replica.finished[rid].reason.type == "abort":
            assert replica.outputs[rid] == expected[: len(replica.outputs[rid])]
        else:
            assert replica.outputs[rid] == expected
            assert replica.num_rows[rid] == max(len(prompt), len(prompt) + len(expected) - 1)


def test_a_decoder_that_fails_on_one_requests_tokens_fails_that_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """The leader searches stop strings in what the tokenizer's library makes of sampled tokens."""
    check = StopChecker.check

    def fail_one(self: StopChecker, req: Req) -> FinishReason | None:
        if req.rid == "bad" and len(req.output_ids) == 3:
            raise DecoderError("a decoder of the tokenizer failed")
        return check(self, req)

    monkeypatch.setattr(StopChecker, "check", fail_one)
    replica = Replica(make_config(), num_pages=64)
    prompts = {rid: [number] * 6 for number, rid in enumerate(("bad", "good"), 1)}
    for rid, prompt in prompts.items():
        replica.submit(rid, prompt, SamplingParams(max_new_tokens=20))
    replica.run_until_idle()
    assert replica.finished["bad"].reason.is_failure
    assert replica.outputs["good"] == expected_output(prompts["good"], 20)
