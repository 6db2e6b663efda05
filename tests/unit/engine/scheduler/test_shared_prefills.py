"""Requests that share a prefix with a running prefill wait for its pages, run together then, and stand in nobody's way."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.dp_harness import DpGroup
from support.replica_harness import Replica, expected_output

from waybill.engine.config import EngineConfig
from waybill.engine.io_struct import OutputOptions, SamplingParams
from waybill.engine.ipc.frontend_messages import AbortReq

PROMPT = [index % 47 + 1 for index in range(64)]


def make_config(**fields: object) -> EngineConfig:
    defaults: dict[str, object] = {"model_path": "", "page_size": 1, "max_running_requests": 64, "overlap_depth": 1}
    return EngineConfig(**(defaults | fields))


def greedy(max_new_tokens: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True)


def num_steps(config: EngineConfig, prompts: list[list[int]], max_new_tokens: int = 32) -> int:
    """Steps from the arrival of all until all have ended, their outputs checked."""
    replica = Replica(config, num_pages=16_384 // config.page_size, context_length=256)
    for index, prompt in enumerate(prompts):
        replica.submit(f"r{index}", prompt, greedy(max_new_tokens))
    replica.run_until_idle()
    for index, prompt in enumerate(prompts):
        assert replica.outputs[f"r{index}"] == expected_output(prompt, max_new_tokens, ignore_eos=True)
        assert replica.num_rows[f"r{index}"] == len(prompt) + max_new_tokens - 1
    return int(replica.scheduler.state()["num_steps"])


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("depth", [0, 1])
def test_64_samples_take_the_steps_of_one_and_those_until_its_prompt_is_committed(
    page_size: int, cache: bool, depth: int
) -> None:
    config = make_config(page_size=page_size, enable_prefix_cache=cache, overlap_depth=depth, chunked_prefill_size=4096)
    alone = num_steps(config, [PROMPT])
    together = num_steps(config, [PROMPT] * 64)
    # With nothing to share they need not wait at all.
    assert together == alone + (1 + depth if cache else 0)


def test_chunks_of_the_shared_prompt_are_computed_once() -> None:
    config = make_config(chunked_prefill_size=64)
    prompt = [index % 47 + 1 for index in range(160)]
    # Three steps of prefill, one to commit the last, one in which 63 compute a token each.
    assert num_steps(config, [prompt] * 64) == num_steps(config, [prompt]) + 2


def test_all_but_the_first_compute_one_token() -> None:
    replica = Replica(make_config(chunked_prefill_size=16), num_pages=4096)
    for sample in range(8):
        replica.submit(f"r{sample}", PROMPT, greedy(4))
    replica.run_until_idle()
    assert replica.cached == {"r0": 0} | dict.fromkeys((f"r{i}" for i in range(1, 8)), len(PROMPT) - 1)


def test_a_long_common_beginning_is_computed_once_and_a_short_one_is_not_waited_for() -> None:
    for num_common, cached in ((48, 48), (1, 0)):
        replica = Replica(make_config(), num_pages=4096)
        for index in range(4):
            replica.submit(f"r{index}", PROMPT[:num_common] + [index + 1] * 16, greedy(2))
        replica.run_until_idle()
        assert list(replica.cached.values()) == [0, cached, cached, cached]


def test_prompts_of_different_keys_share_nothing_and_do_not_wait() -> None:
    replica = Replica(make_config(), num_pages=4096)
    for key in "abcd":
        replica.submit(key, PROMPT, greedy(2), extra_key=key)
    replica.turn()
    assert len(replica.scheduler.queues.running) == 4


def test_prompt_logprobs_wait_only_for_what_they_may_take() -> None:
    replica = Replica(make_config(), num_pages=4096)
    replica.submit("first", PROMPT, greedy(2))
    replica.submit("all", PROMPT, greedy(2), output_options=OutputOptions(return_logprob=True, logprob_start_len=0))
    replica.submit("last", PROMPT, greedy(2), output_options=OutputOptions(return_logprob=True, logprob_start_len=60))
    replica.turn()
    assert [req.rid for req in replica.scheduler.queues.running] == ["first", "all"]
    replica.run_until_idle()
    assert replica.cached == {"first": 0, "all": 0, "last": 59}


def test_who_shares_nothing_goes_past_those_that_wait() -> None:
    replica = Replica(make_config(chunked_prefill_size=32), num_pages=4096)
    for sample in range(4):
        replica.submit(f"r{sample}", [*PROMPT, *PROMPT[:16]], greedy(4))
    replica.submit("other", [5] * 4, greedy(4))
    admitted_at: dict[str, int] = {}
    for turn in range(40):
        replica.turn()
        for rid in replica.cached:
            admitted_at.setdefault(rid, turn)
    # The budget of the first two steps is the first one's; the third has room.
    assert admitted_at["other"] < admitted_at["r1"] == admitted_at["r3"]


def test_nobody_waits_for_a_request_of_lower_priority() -> None:
    replica = Replica(make_config(), num_pages=4096)
    replica.submit("first", PROMPT, greedy(4))
    replica.turn()
    replica.submit("equal", PROMPT, greedy(4))
    replica.submit("higher", PROMPT, greedy(4), priority=1)
    replica.turn()
    assert [req.rid for req in replica.scheduler.queues.running] == ["first", "higher"]
    replica.run_until_idle()
    assert replica.cached == {"first": 0, "higher": 0, "equal": len(PROMPT) - 1}


@pytest.mark.parametrize("turns", range(8))
def test_the_first_one_is_aborted_while_the_others_wait(turns: int) -> None:
    replica = Replica(make_config(chunked_prefill_size=16), num_pages=4096)
    for sample in range(4):
        replica.submit(f"r{sample}", PROMPT, greedy(8))
    for _ in range(turns):
        replica.turn()
    replica.send(lambda number: AbortReq(number, "r0", exact=True))
    replica.run_until_idle()
    assert replica.finished["r0"].reason.type == "abort"
    for sample in range(1, 4):
        assert replica.outputs[f"r{sample}"] == expected_output(PROMPT, 8, ignore_eos=True)


@pytest.mark.parametrize("depth", [0, 1])
def test_the_first_one_is_retracted_while_the_others_wait(depth: int) -> None:
    """A long decode crowds out the prefill that the others wait for."""
    replica = Replica(make_config(chunked_prefill_size=8, overlap_depth=depth), num_pages=72)
    replica.submit("a", [7] * 8, greedy(60), priority=1)
    for sample in range(3):
        replica.submit(f"r{sample}", PROMPT, greedy(8))
    replica.run_until_idle()
    assert "r0" in replica.retracted, "the pool was meant to run out"
    for sample in range(3):
        assert replica.outputs[f"r{sample}"] == expected_output(PROMPT, 8, ignore_eos=True)
    assert replica.outputs["a"] == expected_output([7] * 8, 60, ignore_eos=True)


@settings(max_examples=40, deadline=None)
@given(
    groups=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40), st.integers(1, 6)), min_size=1, max_size=5),
    priorities=st.lists(st.integers(0, 1), min_size=30, max_size=30),
    aborts=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 4), st.integers(0, 5)), max_size=3),
    chunk=st.sampled_from([1, 3, 8, -1]),
    depth=st.integers(0, 1),
    page_size=st.sampled_from([1, 4]),
    num_tokens=st.integers(56, 160),
)
def test_any_groups(
    groups: list[tuple[int, int, int]],
    priorities: list[int],
    aborts: list[tuple[int, int, int]],
    chunk: int,
    depth: int,
    page_size: int,
    num_tokens: int,
) -> None:
    """Groups of equal prompts over common beginnings, with priorities, aborts and a small pool: all end, with the tokens
    that they have alone."""
    config = make_config(chunked_prefill_size=chunk, overlap_depth=depth, page_size=page_size, max_running_requests=6)
    replica = Replica(config, num_tokens // page_size, context_length=56)
    prompts: dict[str, list[int]] = {}
    for group, (family, length, samples) in enumerate(groups):
        prompt = [family + 1] * (length // 2) + [group + 1] * (length - length // 2)
        for sample in range(samples):
            prompts[f"g{group}_{sample}."] = prompt
            priority = priorities[len(prompts) - 1]
            replica.submit(f"g{group}_{sample}.", prompt, SamplingParams(max_new_tokens=10), priority=priority)
    for turn in range(21):
        for when, group, sample in aborts:
            if when == turn:
                rid = f"g{group}_{sample}."
                replica.send(lambda number, rid=rid: AbortReq(number, rid, exact=True))
        replica.turn()
    replica.run_until_idle()
    assert replica.finished.keys() == prompts.keys()
    for rid, prompt in prompts.items():
        expected = expected_output(prompt, 10)
        if replica.finished[rid].reason.type == "abort":
            expected = expected[: len(replica.outputs[rid])]
        assert replica.outputs[rid] == expected


def test_two_dp_ranks_with_groups_of_their_own() -> None:
    config = make_config(dp_size=2, max_running_requests=16, enable_return_routed_experts=True)
    group = DpGroup(config, num_pages=2048)
    for sample in range(16):
        for dp_rank in range(2):
            group.frontend.submit(dp_rank, f"{dp_rank}-{sample}", PROMPT, max_new_tokens=8, ignore_eos=True)
    group.run_until_rest()
    for rid, answer in group.frontend.answers.items():
        assert answer.token_ids == expected_output(PROMPT, 8, ignore_eos=True)
        assert answer.error is None
        assert (answer.routed == group.expected_rows(rid)).all()
    # Eight steps of one request, and two until the prompts are committed.
    assert len(group.leaders[0].runner.forwards) == 10
    group.check_records()
