"""Greedy tokens, log-probabilities and routes of the engine against `transformers`, in float32.

Equality under the near-tie rule (`engine/routing/transformers_reference.py`), for prompts of 1 to 1,500 tokens. `make test`
runs a pairwise covering of the settings, `make test-matrix` all of them. With several dp ranks the prompts are fewer, and
not spread evenly: one rank has most of them, and where the pool is tight it is tight for that rank alone.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.reference_equality import MAX_NEW_TOKENS, Request, Setting, ask, compare, make_engine
from support.same_rows import check_same_rows

from waybill import Engine
from waybill.engine.routing.transformers_reference import Reference

CHECKPOINT = Path(__file__).parents[2] / "examples" / "tiny_moe" / "checkpoint"
NUM_PROMPTS = 64
MAX_PROMPT = 1500
# Small chunks are thousands of steps: few prompts.
SMALL_CHUNKS = (1, 7)
MAX_PROMPT_OF_SINGLE_TOKENS = 100
# Retraction is forced: the first few prompts decode for so long that what runs beside them outgrows a pool that holds
# the longest request and little more.
NUM_LONG_ANSWERS, NUM_EXTREMES = 6, 7
LONG_ANSWER_TOKENS = 300
TIGHT_POOL_TOKENS = 1600
# Where there are few prompts.
LONG_ANSWER_TOKENS_OF_FEW = 150
TIGHT_POOL_TOKENS_OF_FEW = 520


AXES: tuple[tuple[Any, ...], ...] = ((1, 2), ("ep", "tp"), (1, 7, 64, -1), (True, False), (False, True), (0, 1))
ALL_SETTINGS = [Setting(*values) for values in itertools.product(*AXES)]
DP_SETTINGS = [
    replace(setting, dp=2, dispatcher=dispatcher)
    for setting in ALL_SETTINGS
    for dispatcher in ("all_gather", "all_to_all")
    # All-to-all sends tokens to whole experts.
    if dispatcher == "all_gather" or setting.split == "ep"
]


def pairwise(settings: list[Setting]) -> list[Setting]:
    """A small subset in which every pair of values of two axes occurs (greedy cover)."""
    names = list(Setting.__dataclass_fields__)

    def pairs(setting: Setting) -> set[tuple[str, Any, str, Any]]:
        return {(a, getattr(setting, a), b, getattr(setting, b)) for a, b in itertools.combinations(names, 2)}

    missing = set().union(*map(pairs, settings))
    chosen: list[Setting] = []
    while missing:
        best = max(settings, key=lambda setting: len(pairs(setting) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


# One token a step takes long: once here, else left to the matrix; with several dp ranks a few tokens, too.
PAIRWISE = [
    Setting(1, "tp", 1, cache=True, retract=True, depth=0),
    *pairwise([setting for setting in ALL_SETTINGS if setting.chunk != 1]),
]
# Four ranks take long on two cores: one such setting here.
DP_PAIRWISE = [
    setting
    for setting in pairwise([setting for setting in DP_SETTINGS if setting.chunk not in SMALL_CHUNKS])
    if setting.tp == 1 or setting.split == "tp"
]


def make_prompts() -> list[list[int]]:
    """Mixed lengths, the extremes included; some share long prefixes, so that the cache has something to give."""
    rng = random.Random(0)
    lengths = [1, 2, 15, 16, 17, 33, MAX_PROMPT] + [int(MAX_PROMPT ** rng.uniform(0.2, 0.8)) for _ in range(37)]
    prompts = [[rng.randrange(256) for _ in range(length)] for length in lengths]
    shared = [rng.randrange(256) for _ in range(90)]
    prompts += [
        shared[: rng.randrange(40, 90)] + [rng.randrange(256) for _ in range(rng.randrange(1, 30))] for _ in range(20)
    ]
    assert len(prompts) == NUM_PROMPTS
    return prompts


def settings_to_run() -> Iterator[Any]:
    for setting in ALL_SETTINGS + DP_SETTINGS:
        marks = [] if setting in PAIRWISE + DP_PAIRWISE else [pytest.mark.matrix]
        yield pytest.param(setting, id=str(setting), marks=marks)


@pytest.mark.parametrize("setting", list(settings_to_run()))
def test_equals_transformers(setting: Setting, reference: Reference) -> None:
    if setting.dp > 1:
        check_dp_equality(setting, reference, "cpu")
    else:
        check_equality(setting, reference, "cpu")


ON_GPU = [
    Setting(1, "ep", 7, cache=True, retract=False, depth=1),
    Setting(1, "ep", 64, cache=False, retract=True, depth=0),
    Setting(1, "ep", -1, cache=True, retract=True, depth=1),
    Setting(1, "tp", 64, cache=True, retract=False, depth=0),
    Setting(2, "ep", 64, cache=True, retract=True, depth=1),
    Setting(2, "tp", -1, cache=True, retract=False, depth=1),
    Setting(1, "ep", 64, cache=True, retract=True, depth=1, dp=2),
    Setting(1, "tp", -1, cache=True, retract=False, depth=1, dp=2),
    Setting(1, "ep", 64, cache=False, retract=True, depth=0, dp=2, dispatcher="all_to_all"),
    # Without graphs, in which both dispatchers would be one.
    Setting(1, "ep", 64, cache=True, retract=True, depth=1, dp=2, attention="sdpa"),
    Setting(1, "ep", 64, cache=True, retract=True, depth=1, dp=2, dispatcher="all_to_all", attention="sdpa"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("setting", ON_GPU, ids=str)
def test_equals_transformers_on_gpu(setting: Setting) -> None:
    """Triton kernels, CUDA graphs and the pinned ring, against `transformers` on the same device."""
    if torch.cuda.device_count() < setting.dp * setting.tp:
        pytest.skip(f"needs {setting.dp * setting.tp} CUDA devices")
    check = check_dp_equality if setting.dp > 1 else check_equality
    check(setting, Reference(str(CHECKPOINT), "cuda"), "cuda")


def check_equality(setting: Setting, reference: Reference, device: str) -> None:
    prompts = make_prompts()
    long_answer, tight_pool_tokens = LONG_ANSWER_TOKENS_OF_FEW, TIGHT_POOL_TOKENS_OF_FEW
    if setting.chunk in SMALL_CHUNKS:
        prompts = prompts[1 :: 4 if setting.chunk > 1 and not setting.retract else 8]
        if setting in PAIRWISE and setting.chunk == 1 and device == "cpu":
            # A step for each of their tokens, again after each retraction: longer ones are for the matrix.
            prompts = [prompt for prompt in prompts if len(prompt) <= MAX_PROMPT_OF_SINGLE_TOKENS]
    elif setting in PAIRWISE and device == "cpu":
        # All of them are for the matrix and for a GPU.
        prompts = prompts[1::4] if setting.retract else [*prompts[NUM_EXTREMES::3], prompts[NUM_EXTREMES - 1]]
    else:
        long_answer, tight_pool_tokens = LONG_ANSWER_TOKENS, TIGHT_POOL_TOKENS
    num_new_tokens = [MAX_NEW_TOKENS] * len(prompts)
    if setting.retract:
        num_new_tokens[:NUM_LONG_ANSWERS] = [long_answer] * NUM_LONG_ANSWERS
    requests = [Request(*each) for each in zip(prompts, num_new_tokens, strict=True)]
    pool_tokens = tight_pool_tokens if setting.retract else 64 * 1600
    with make_engine(CHECKPOINT, setting, pool_tokens, device) as engine:
        answers = ask(engine, requests)
        state = engine.get_server_info()
    assert (state["num_retractions"] > 0) == setting.retract
    if setting.cache:
        assert sum(answer["meta_info"]["cached_tokens"] for answer in answers) > 0
    print(f"{setting}: {compare(reference, requests, answers)}")


# With several dp ranks: how many of the prompts go to the last one, and what forces it, and it alone, to retract.
NUM_ON_ONE_RANK = 14
NUM_DP_LONG_ANSWERS, DP_LONG_ANSWER_TOKENS = 6, 110


def check_dp_equality(setting: Setting, reference: Reference, device: str) -> None:
    # The shortest come first and, where retraction is wanted, answer at length.
    prompts = sorted(make_prompts()[1::4], key=len)
    num_new_tokens = [MAX_NEW_TOKENS] * len(prompts)
    if setting.retract:
        num_new_tokens[:NUM_DP_LONG_ANSWERS] = [DP_LONG_ANSWER_TOKENS] * NUM_DP_LONG_ANSWERS
    ranks = [int(index < NUM_ON_ONE_RANK) for index in range(len(prompts))]
    requests = [Request(*each) for each in zip(prompts, num_new_tokens, ranks, strict=True)]
    pool_tokens = TIGHT_POOL_TOKENS_OF_FEW if setting.retract else 16 * 1600
    with make_engine(CHECKPOINT, setting, pool_tokens, device, context_length=1600) as engine:
        answers = ask(engine, requests)
        again = engine.generate(
            input_ids=prompts[0], sampling_params={"temperature": 0.0, "max_new_tokens": 2}, routed_dp_rank=0
        )
        state = engine.get_server_info()
    assert [rank["num_retractions"] > 0 for rank in state["dp_ranks"]] == [False, setting.retract]
    assert again["output_ids"] == answers[0]["output_ids"][: len(again["output_ids"])], (
        "the other rank answers otherwise"
    )
    print(f"{setting}: {compare(reference, requests, answers)}")


def test_first_filed_rows_equal_those_of_the_second_prefill(reference: Reference) -> None:
    """A retraction computes a request's KV anew. What answered for it before, and what the slots hold now, are equal
    with unchanged weights; or both are what the reference finds, near-ties apart."""
    # Without the extremes, the first seven.
    prompts = make_prompts()[7:15]
    with Engine(
        str(CHECKPOINT),
        tp_size=1,
        dtype="float32",
        kv_cache_tokens=TIGHT_POOL_TOKENS_OF_FEW,
        max_running_requests=16,
        enable_return_routed_experts=True,
    ) as engine:
        params = {"temperature": 0.0, "max_new_tokens": LONG_ANSWER_TOKENS_OF_FEW, "ignore_eos": True}
        answers = engine.generate(input_ids=prompts, sampling_params=params, return_routed_experts=True)
        num_compared = 0
        for prompt, answer in zip(prompts, answers, strict=True):
            if answer["meta_info"]["num_retractions"] == 0:
                continue
            tokens = prompt + answer["output_ids"]
            again = engine.generate(input_ids=tokens, sampling_params={"max_new_tokens": 0}, return_routed_experts=True)
            first, second = (reply["meta_info"]["routed_experts"] for reply in (answer, again))
            assert len(first) == len(tokens) - 1 and len(second) == len(tokens)
            check_same_rows(reference, tokens, first, second)
            num_compared += 1
    assert num_compared > 0
