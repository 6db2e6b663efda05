"""The sampler against definitions written out, and its independence of the batch."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from waybill.engine.io_struct import OutputOptions, SamplingParams
from waybill.engine.plan import Draw, PromptScores
from waybill.engine.runner.gumbel import select_choose_tokens
from waybill.engine.runner.plain_sampling import sample_plain
from waybill.engine.runner.sampler import (
    MIN_LOGPROB,
    NO_TOKEN,
    SamplingRow,
    sample,
    score_tokens,
    start_counts,
    uniform,
)
from waybill.parallel.mesh import Axis

V = 12
TOP_2 = OutputOptions(return_logprob=True, top_logprobs_num=2)


def row(position: int = 0, stop_ids: tuple[int, ...] = (), **params: object) -> SamplingRow:
    return SamplingRow(SamplingParams(**params), OutputOptions(), stop_ids, position=position)


def logits_of(*values: float) -> torch.Tensor:
    return torch.tensor([list(values)])


def draws(logits: torch.Tensor, num: int, **params: object) -> list[int]:
    rows = [row(position=i, sampling_seed=7, **params) for i in range(num)]
    return sample(logits.expand(num, -1), rows).token_ids.tolist()


def test_temperature_zero_is_greedy() -> None:
    assert draws(logits_of(0.1, 3.0, 2.9), 5, temperature=0.0) == [1] * 5


def test_frequencies_follow_the_distribution() -> None:
    logits = logits_of(math.log(0.7), math.log(0.2), math.log(0.1))
    counts = np.bincount(draws(logits, 4000), minlength=3) / 4000
    assert np.abs(counts - [0.7, 0.2, 0.1]).max() < 0.03


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 1}, {0}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.65}, {0, 1}),
        ({"min_p": 0.4}, {0, 1}),
        ({"top_k": 3, "top_p": 0.99, "min_p": 0.3}, {0, 1}),
    ],
)
def test_filters_keep_exactly_what_they_should(params: dict[str, float], allowed: set[int]) -> None:
    logits = torch.log(torch.tensor([[0.6, 0.3, 0.07, 0.03]]))
    assert set(draws(logits, 500, **params)) == allowed


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**64 - 1), position=st.integers(0, 10**6), others=st.integers(0, 5))
def test_draw_depends_on_seed_and_position_only(seed: int, position: int, others: int) -> None:
    logits = torch.randn(6, V, generator=torch.Generator().manual_seed(3))
    mine = row(position=position, sampling_seed=seed, top_p=0.9)
    alone = sample(logits[:1], [mine]).token_ids[0]
    crowd = [mine] + [row(position=i, sampling_seed=i) for i in range(others)]
    assert sample(logits[: len(crowd)], crowd).token_ids[0] == alone
    assert 0.0 <= uniform(seed, position) < 1.0


def test_logit_bias_and_min_new_tokens() -> None:
    logits = logits_of(5.0, 1.0, 0.0)
    assert sample(logits, [row(temperature=0.0, logit_bias={2: 9.0})]).token_ids.tolist() == [2]
    banned = row(temperature=0.0, min_new_tokens=2, stop_ids=(0,))
    assert sample(logits, [banned]).token_ids.tolist() == [1]
    banned.position = 2
    assert sample(logits, [banned]).token_ids.tolist() == [0]


def test_nothing_but_what_is_allowed_is_sampled() -> None:
    logits = logits_of(5.0, 1.0, 0.0, 0.9)
    assert set(draws(logits, 60, temperature=5.0, allowed_token_ids=(1, 3))) == {1, 3}
    # Neighbours are as they were.
    rows = [row(temperature=0.0, allowed_token_ids=(2,)), row(temperature=0.0)]
    assert sample(logits.expand(2, -1), rows).token_ids.tolist() == [2, 0]
    both = row(temperature=0.0, allowed_token_ids=(1, 3), logit_bias={1: -1e30})
    assert sample(logits, [both]).token_ids.tolist() == [3]


def test_penalties_count_prompt_and_output_as_defined() -> None:
    logits = logits_of(2.0, 1.5, -1.0, 0.0)
    repetition = row(temperature=0.0, repetition_penalty=2.0)
    start_counts(repetition, np.array([0], dtype="<i4"), num_prompt=1, vocab_size=4, device=torch.device("cpu"))
    assert sample(logits, [repetition]).token_ids.tolist() == [1]
    frequency = row(temperature=0.0, frequency_penalty=0.3)
    start_counts(frequency, np.array([0], dtype="<i4"), num_prompt=1, vocab_size=4, device=torch.device("cpu"))
    # 2.0, then 1.7, then 1.4 < 1.5: the prompt's own token does not count.
    assert [sample(logits, [frequency]).token_ids.item() for _ in range(3)] == [0, 0, 1]


def test_logprobs_are_those_of_the_model() -> None:
    logits = torch.randn(2, V)
    asking = SamplingRow(SamplingParams(temperature=0.5, top_k=2, logit_bias={3: 50.0}), TOP_2, ())
    result = sample(logits, [asking, row(temperature=0.0)])
    expected = torch.log_softmax(logits[0], dim=-1)
    assert result.token_ids[0] == 3
    assert result.logprobs is not None
    assert result.logprobs[0] == expected[3]
    assert result.top[0] is not None
    assert torch.equal(result.top[0][1], expected.topk(2).indices)
    assert result.top[1] is None


def test_score_tokens() -> None:
    logits = torch.randn(3, V)
    scores = score_tokens(logits, torch.tensor([1, 2, 3]), 1)
    expected = torch.log_softmax(logits, dim=-1)
    assert scores.logprobs == [expected[i, i + 1].item() for i in range(3)]
    assert [pairs[0][1] for pairs in scores.top] == expected.argmax(dim=-1).tolist()
    order = expected.argsort(dim=-1, descending=True)
    assert [int(order[i, rank - 1]) for i, rank in enumerate(scores.ranks)] == [1, 2, 3]
    assert score_tokens(torch.zeros(1, V), torch.tensor([2]), 0).ranks == [1], "equal ones share the best rank"


@given(st.integers(0, 2**32), st.integers(0, 3))
def test_an_unfiltered_row_does_not_notice_a_filtered_neighbour(seed: int, place: int) -> None:
    """Their orders of summation differ, and the same point may fall on another token."""
    logits = torch.randn(1, 64, generator=torch.Generator().manual_seed(seed % 97))
    own = row(sampling_seed=seed)
    alone = sample(logits, [own]).token_ids.item()
    rows = [row(top_p=0.9, sampling_seed=1), row(top_k=5, sampling_seed=2), row(min_p=0.1, sampling_seed=3)]
    rows.insert(place, row(sampling_seed=seed))
    assert sample(logits.repeat(4, 1), rows).token_ids[place].item() == alone


NAN, INF = float("nan"), float("inf")
BAD_ROWS = {
    "nan": [0.0, NAN, 1.0, 2.0],
    "all nan": [NAN] * 4,
    "infinite": [0.0, INF, 1.0, 2.0],
    "all banned": [-INF] * 4,
    "nan where it is banned": [NAN, 1.0, 0.0, 2.0],
    "infinite where it is banned": [INF, 1.0, 0.0, 2.0],
}
WAYS: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0.0},
    "greedy by top_k": {"top_k": 1},
    "random": {},
    "tiny temperature": {"temperature": 1e-5},
    "hot": {"temperature": 1e6},
    "top_k": {"top_k": 2},
    "top_p": {"top_p": 1e-45},
    "min_p": {"min_p": 1.0},
    "penalties": {"temperature": 0.0, "repetition_penalty": 0.01, "frequency_penalty": -2.0, "presence_penalty": 2.0},
    "random with penalties": {"repetition_penalty": 2.0},
    "bias": {"temperature": 0.0, "logit_bias": {1: 1e30, 2: -1e30}},
}


def bad_row_of(name: str, way: str, device: torch.device) -> tuple[list[float], SamplingRow]:
    params = WAYS[way] | ({"min_new_tokens": 5} if "where it is banned" in name else {})
    bad = SamplingRow(SamplingParams(sampling_seed=9, **params), TOP_2, (0,))
    start_counts(bad, np.array([1, 1, 3], dtype="<i4"), 1, 4, device)
    return BAD_ROWS[name], bad


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_row_without_a_choice_is_told_and_changes_no_other(name: str, way: str) -> None:
    """It has a token that may be looked up by, and its penalties are still counted; every other row is the same, bit for
    bit, however it is sampled."""
    cpu = torch.device("cpu")
    good = torch.randn(len(WAYS), 4, generator=torch.Generator().manual_seed(1))
    values, bad = bad_row_of(name, way, cpu)

    def rows() -> list[SamplingRow]:
        made = [SamplingRow(SamplingParams(sampling_seed=i, **p), TOP_2, (0,)) for i, p in enumerate(WAYS.values())]
        for one in made:
            start_counts(one, np.array([1, 2, 3], dtype="<i4"), 1, 4, cpu)
        return made

    # In the place of a good row, so that the batches have one shape.
    expected = sample(good, rows())
    spoilt = good.clone()
    spoilt[3] = torch.tensor(values)
    sampled = sample(spoilt, [*rows()[:3], bad, *rows()[4:]])
    others = [i for i in range(len(WAYS)) if i != 3]
    assert sampled.outcomes[3] == NO_TOKEN
    assert torch.equal(sampled.outcomes[others], expected.outcomes[others])
    assert (expected.outcomes != NO_TOKEN).all() and torch.equal(expected.outcomes, expected.token_ids)
    assert 0 <= sampled.token_ids[3] < 4
    assert sampled.logprobs is not None and expected.logprobs is not None
    assert torch.equal(sampled.logprobs[others], expected.logprobs[others])


def test_everything_banned_is_no_choice() -> None:
    banned = row(min_new_tokens=2, stop_ids=(0, 1))
    assert sample(logits_of(1.0, 2.0), [banned]).outcomes.tolist() == [NO_TOKEN]
    assert sample(logits_of(1.0, 2.0, 0.5), [banned]).outcomes.tolist() == [2]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e30])
def test_every_legal_value_leaves_a_choice(way: str, scale: float) -> None:
    """Extreme parameters on large scores: float32 stays finite."""
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(2)) * scale
    rows = [row(position=i, **WAYS[way]) for i in range(4)]
    for one in rows:
        start_counts(one, np.array([0] + [1] * 100_000, dtype="<i4"), 1, 4, torch.device("cpu"))
    assert (sample(logits, rows).outcomes != NO_TOKEN).all()


def test_probability_zero_has_a_log_probability_that_json_can_hold() -> None:
    logits = logits_of(0.0, -INF, -1e38)
    biased = SamplingRow(
        SamplingParams(temperature=0.0, logit_bias={2: 1e30}), msgspec.structs.replace(TOP_2, top_logprobs_num=3), ()
    )
    scores = score_tokens(logits, torch.tensor([1]), 3)
    assert scores.logprobs == [MIN_LOGPROB]
    assert [value for value, _ in scores.top[0]] == [0.0, MIN_LOGPROB, MIN_LOGPROB]
    sampled = sample(logits_of(0.0, -INF, -1e29), [biased])
    assert sampled.token_ids.tolist() == [2]
    assert sampled.logprobs is not None and sampled.logprobs.tolist() == [MIN_LOGPROB]


@pytest.mark.parametrize("name", ["nan", "all nan", "infinite", "all banned"])
def test_scores_of_a_row_that_is_not_finite_are_nan(name: str) -> None:
    scores = score_tokens(torch.tensor([BAD_ROWS[name], [0.0, 1.0, 2.0, 3.0]]), torch.tensor([3, 3]), 0)
    values = scores.logprobs
    assert math.isnan(values[0]) and not math.isnan(values[1])
    assert not scores.are_finite and PromptScores(values[1:], [[]], [1]).are_finite


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
def test_rows_without_a_choice_on_a_gpu(way: str) -> None:
    """No assertion of the device, no wait for it, the same outcomes as on a CPU."""
    device = torch.device("cuda")
    values, rows = zip(*(bad_row_of(name, way, device) for name in BAD_ROWS), strict=True)
    good = [0.0, 1.0, 2.0, 3.0]
    logits = torch.tensor([*values, good]).to(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampled = sample(logits, [*rows, row(temperature=0.0)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sampled.outcomes.tolist() == [NO_TOKEN] * len(BAD_ROWS) + [3]
    assert sampled.token_ids.min() >= 0 and sampled.token_ids.max() < 4


@pytest.mark.gpu
def test_on_a_gpu_a_plain_request_gets_the_token_that_the_leader_would_sample() -> None:
    """Of bfloat16 columns as of float32 ones, without a wait for the device."""
    device = torch.device("cuda")
    logits = torch.randn(6, 4100, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    logits[3, 5] = NAN
    draws = [Draw(temperature, seed, seed, True) for seed, temperature in enumerate((0.0, 1.0, 0.3, 1.0, 1e-5, 2.0))]
    rows = [
        SamplingRow(SamplingParams(temperature=draw.temperature, sampling_seed=draw.seed), TOP_2, (), draw.position)
        for draw in draws
    ]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = sample_plain(logits, 0, logits.shape[1], draws, Axis.single(), select_choose_tokens(device))
        expected = sample(logits, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.outcomes, expected.outcomes) and found.outcomes[3] == NO_TOKEN
    assert found.logprobs is not None and expected.logprobs is not None
    there = [0, 1, 2, 4, 5]
    torch.testing.assert_close(found.logprobs[there], expected.logprobs[there])


@pytest.mark.gpu
def test_on_a_gpu_samples_as_on_a_cpu_and_never_waits() -> None:
    """Every way of the sampler at once; torch raises where an operation waits for the device."""
    logits = torch.randn(5, 4096, generator=torch.Generator().manual_seed(0))
    ways = [
        {"temperature": 0.0},
        {"sampling_seed": 1},
        {"top_p": 0.9, "top_k": 50, "min_p": 0.01, "sampling_seed": 2},
        {"temperature": 0.0, "logit_bias": {7: 50.0}, "frequency_penalty": 1.0, "repetition_penalty": 1.5},
        {"temperature": 0.0, "min_new_tokens": 3},
    ]
    results = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        rows = [SamplingRow(SamplingParams(**way), TOP_2, (5, 6)) for way in ways]
        for one in rows:
            start_counts(one, np.array([1, 2, 2, 7], dtype="<i4"), 1, 4096, device)
        on_device = logits.to(device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            results.append(sample(on_device, rows))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    expected, found = results
    assert torch.equal(found.token_ids.cpu(), expected.token_ids)
    assert found.logprobs is not None and expected.logprobs is not None
    torch.testing.assert_close(found.logprobs.cpu(), expected.logprobs)
