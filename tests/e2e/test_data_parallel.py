"""Two dp ranks: whatever the mix over them, every answer is what `transformers` says; and with nothing to do they sleep."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from support.engine_answers import at_rest, greedy, ids
from support.process_tree import ranks_of_run
from support.same_rows import check_same_rows

from waybill import Engine
from waybill.engine.routing.transformers_reference import Reference
from waybill.engine.routing.wire import stitch

NUM_MOE_LAYERS, TOP_K = 6, 4
IDLE_SECONDS = 6.0
MAX_IDLE_SHARE = 0.005
FLUSH_SHOWS_S = 30.0


@pytest.fixture(scope="module")
def engine(checkpoint: str) -> Iterator[Engine]:
    with Engine(
        checkpoint,
        tp_size=1,
        dp_size=2,
        dtype="float32",
        enable_return_routed_experts=True,
        kv_cache_tokens=4096,
        max_running_requests=4,
        chunked_prefill_size=32,
    ) as engine:
        yield engine


def ask_all(engine: Engine, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All at once."""

    async def run() -> list[dict[str, Any]]:
        return await asyncio.gather(
            *(engine.async_generate(return_logprob=True, return_routed_experts=True, **each) for each in requests)
        )

    return asyncio.run(run())


def check(reference: Reference, request: dict[str, Any], answer: dict[str, Any]) -> None:
    """Tokens, log-probabilities and all rows, near-ties apart."""
    meta = answer["meta_info"]
    if "routed_dp_rank" in request:
        assert meta["dp_rank"] == request["routed_dp_rank"]
    assert len(answer["output_ids"]) == request["sampling_params"]["max_new_tokens"]
    logprobs = [logprob for logprob, _, _ in meta["output_token_logprobs"]]
    reference.check_generation(request["input_ids"], answer["output_ids"], logprobs, meta["routed_experts"])


@pytest.mark.parametrize("rank", [0, 1])
def test_all_requests_on_one_rank(engine: Engine, reference: Reference, rank: int) -> None:
    requests = [
        {"input_ids": ids(f"all on rank {rank}, number {i} " * (i + 1)), "sampling_params": greedy(6 + i)}
        for i in range(6)
    ]
    requests = [{**request, "routed_dp_rank": rank} for request in requests]
    for request, answer in zip(requests, ask_all(engine, requests), strict=True):
        check(reference, request, answer)
    steps = [state["num_steps"] for state in at_rest(engine)["dp_ranks"]]
    assert steps[0] == steps[1], "every rank runs every step, also one without requests"


@pytest.mark.parametrize("long_rank", [0, 1])
def test_a_long_prompt_on_one_rank_while_the_other_decodes(
    engine: Engine, reference: Reference, long_rank: int
) -> None:
    """The prompt takes some 25 chunks; the other rank's answer goes on in all of them."""
    long = {"input_ids": ids(f"long on {long_rank} " * 67), "sampling_params": greedy(4), "routed_dp_rank": long_rank}
    short = {
        "input_ids": ids(f"short beside {long_rank}"),
        "sampling_params": greedy(40),
        "routed_dp_rank": 1 - long_rank,
    }
    for request, answer in zip((long, short), ask_all(engine, [long, short]), strict=True):
        check(reference, request, answer)


def test_requests_spread_and_prefixes_draw(engine: Engine, reference: Reference) -> None:
    requests = [{"input_ids": ids(f"{i} to spread {i}"), "sampling_params": greedy(5)} for i in range(4)]
    answers = ask_all(engine, requests)
    assert sorted(answer["meta_info"]["dp_rank"] for answer in answers) == [0, 0, 1, 1]
    for request, answer in zip(requests, answers, strict=True):
        check(reference, request, answer)
    head = ids("a head that is longer than the blocks of the router's directory, so that it can be found there again: ")
    homes = set()
    for tail in ("one", "two", "three"):
        answer = engine.generate(input_ids=head + ids(tail), sampling_params=greedy(2))
        homes.add(answer["meta_info"]["dp_rank"])
    assert len(homes) == 1
    assert answer["meta_info"]["cached_tokens"] >= len(head)


def test_samples_and_equal_prompts_run_together_and_route_as_one_alone(engine: Engine, reference: Reference) -> None:
    """Four of them in a batch, greedy: each one's tokens and rows are what the reference finds, and those of the prompt are
    those of one alone, near-ties apart."""
    prompt = ids("the same prompt, four times")
    alone = engine.generate(input_ids=prompt, sampling_params=greedy(8), return_routed_experts=True)
    for together in (
        {"input_ids": prompt, "sampling_params": greedy(8) | {"n": 4}},
        {"input_ids": [prompt] * 4, "sampling_params": greedy(8)},
    ):
        for rank in (0, 1):
            engine.flush_cache()
            answers = engine.generate(**together, return_logprob=True, return_routed_experts=True, routed_dp_rank=rank)
            assert sorted(answer["meta_info"]["cached_tokens"] for answer in answers) == [0] + [len(prompt) - 1] * 3
            for answer in answers:
                check(reference, {"input_ids": prompt, "sampling_params": greedy(8)}, answer)
                rows = (answer["meta_info"]["routed_experts"], alone["meta_info"]["routed_experts"])
                check_same_rows(reference, prompt + answer["output_ids"], *(each[: len(prompt)] for each in rows))


def test_samples_of_one_prompt(engine: Engine) -> None:
    prompt = ids("three samples of one prompt, and a neighbour")
    params = {"n": 3, "temperature": 1.0, "max_new_tokens": 7, "ignore_eos": True, "sampling_seed": 3}
    per_rank = []
    for rank in (0, 1):
        answers = engine.generate(
            input_ids=prompt, sampling_params=params, return_routed_experts=True, routed_dp_rank=rank
        )
        assert {answer["meta_info"]["dp_rank"] for answer in answers} == {rank}
        shared = {answer["meta_info"]["routed_experts"][: len(prompt) - 1].tobytes() for answer in answers}
        assert len(shared) == 1, "samples share the rows of their prompt"
        per_rank.append([answer["output_ids"] for answer in answers])
    assert per_rank[0] == per_rank[1]
    assert len({tuple(output) for output in per_rank[0]}) > 1


def test_streams_of_rows_on_both_ranks_at_once(engine: Engine, reference: Reference) -> None:
    """Rows that come with each chunk, joined, are the plain answer's, byte for byte."""
    prompts = [ids(f"a stream on rank {rank}") for rank in (0, 1)]

    async def stream(rank: int) -> tuple[np.ndarray, list[int]]:
        chunks = await engine.async_generate(
            input_ids=prompts[rank],
            sampling_params=greedy(12),
            stream=True,
            routed_dp_rank=rank,
            return_routed_experts=True,
            stream_routed_experts=True,
        )
        rows, outputs = [], []
        async for chunk in chunks:
            rows.append(chunk["meta_info"]["routed_experts"])
            outputs.append(chunk["output_ids"])
        return np.concatenate(rows), outputs[-1]

    async def both() -> list[tuple[np.ndarray, list[int]]]:
        return await asyncio.gather(stream(0), stream(1))

    for rank, (rows, output) in enumerate(asyncio.run(both())):
        request = {"input_ids": prompts[rank], "sampling_params": greedy(12), "routed_dp_rank": rank}
        (plain,) = ask_all(engine, [request])
        check(reference, request, plain)
        assert output == plain["output_ids"]
        check_same_rows(reference, prompts[rank] + output, rows, plain["meta_info"]["routed_experts"])


def test_turns_of_sessions_stay_on_their_ranks_and_deltas_stitch(engine: Engine, reference: Reference) -> None:
    engine.flush_cache()
    histories: dict[str, list[int]] = {"one": [], "two": [], "three": []}
    routes: dict[str, np.ndarray] = {}
    homes: dict[str, set[int]] = {name: set() for name in histories}
    for turn in range(4):
        prompts = {name: tokens + ids(f" {name}, turn {turn}.") for name, tokens in histories.items()}
        starts = {name: max(0, len(tokens) - 1) for name, tokens in histories.items()}
        answers = ask_all(
            engine,
            [
                {
                    "input_ids": prompts[name],
                    "sampling_params": greedy(5),
                    "session_id": name,
                    "routed_experts_start_len": starts[name],
                }
                for name in histories
            ],
        )
        for name, answer in zip(list(histories), answers, strict=True):
            meta = answer["meta_info"]
            homes[name].add(meta["dp_rank"])
            if turn:
                assert meta["cached_tokens"] == len(histories[name]) - 1
            delta = meta["routed_experts"]
            routes[name] = stitch(routes[name], starts[name], delta) if turn else delta
            histories[name] = prompts[name] + answer["output_ids"]
    assert all(len(ranks) == 1 for ranks in homes.values())
    assert len(set().union(*homes.values())) == 2, "sessions are spread"
    for name, tokens in histories.items():
        full = engine.generate(
            input_ids=tokens,
            sampling_params={"max_new_tokens": 0},
            return_routed_experts=True,
            routed_dp_rank=homes[name].copy().pop(),
        )
        assert full["meta_info"]["routed_experts"][:-1].tobytes() == routes[name].tobytes()
        reference.check_routes(tokens, full["meta_info"]["routed_experts"])


def test_aborts_in_every_state_leave_the_others_alone(engine: Engine, reference: Reference) -> None:
    """Of six on one rank three decode, one is amid a long prompt, two wait; on the other rank somebody decodes."""
    victims = [
        {
            "input_ids": ids(f"victim {i} " * (60 if i == 3 else 2)),
            "sampling_params": greedy(2000),
            "rid": f"victim-{i}",
        }
        for i in range(6)
    ]
    rank = 1
    witness = {"input_ids": ids("a witness"), "sampling_params": greedy(60), "routed_dp_rank": 1 - rank}

    async def run() -> tuple[list[dict[str, Any]], dict[str, Any]]:
        seen = engine.async_generate(return_logprob=True, return_routed_experts=True, **witness)
        answers = [
            engine.async_generate(return_routed_experts=True, routed_dp_rank=rank, **victim) for victim in victims
        ]
        tasks = [asyncio.ensure_future(each) for each in (seen, *answers)]
        stream = await engine.async_generate(
            input_ids=ids("tells when"), sampling_params=greedy(9), stream=True, routed_dp_rank=1 - rank
        )
        async for _ in stream:
            engine.abort_request("no such request")
        engine.abort_request("victim")
        return await asyncio.gather(*tasks[1:]), await tasks[0]

    answers, seen = asyncio.run(run())
    check(reference, witness, seen)
    for victim, answer in zip(victims, answers, strict=True):
        meta, num_prompt = answer["meta_info"], len(victim["input_ids"])
        assert meta["finish_reason"]["type"] == "abort"
        rows = meta["routed_experts"]
        assert len(rows) <= num_prompt + len(answer["output_ids"]) - 1 or not len(rows)
        if answer["output_ids"]:
            assert len(rows) == num_prompt + len(answer["output_ids"]) - 1
        if len(rows):
            reference.check_routes((victim["input_ids"] + answer["output_ids"])[: len(rows)], rows)
    at_rest(engine)


def test_a_flush_is_refused_for_the_sake_of_any_rank(engine: Engine) -> None:
    for rank in (0, 1):
        prompt = ids(f"keeps rank {rank} busy")
        stream = engine.generate(input_ids=prompt, sampling_params=greedy(2000), stream=True, routed_dp_rank=rank)
        next(stream)
        with pytest.raises(RuntimeError, match="not flushed: 1 requests run"):
            engine.flush_cache()
        stream.close()
        at_rest(engine)
        engine.flush_cache()
        # Rank 0 answers for all; what another says of itself may be from the moment before.
        deadline = time.monotonic() + FLUSH_SHOWS_S
        while at_rest(engine)["num_cached_pages"]:
            assert time.monotonic() < deadline
        again = engine.generate(input_ids=prompt, sampling_params=greedy(1), routed_dp_rank=rank)
        assert again["meta_info"]["cached_tokens"] == 0


def test_who_waited_for_whom_is_accounted(engine: Engine) -> None:
    """A prefill on rank 1 while rank 0 decodes: rank 0 has waited for it, and knows why."""
    requests = [
        {"input_ids": ids("decodes on"), "sampling_params": greedy(30), "routed_dp_rank": 0},
        {"input_ids": ids("a long prompt " * 100), "sampling_params": greedy(1), "routed_dp_rank": 1},
    ]
    ask_all(engine, requests)
    waits = at_rest(engine)["sync_waits"]
    assert all(wait["rank"] != wait["straggler"] and wait["seconds"] > 0 and wait["num_steps"] > 0 for wait in waits)
    assert any((wait["rank"], wait["straggler"], wait["cause"]) == (0, 1, "prefill") for wait in waits), waits


def cpu_seconds(processes: list[psutil.Process]) -> float:
    """Of all threads but gloo's own, which wake a hundred times a second, whoever uses them."""
    nanoseconds = 0
    for process in processes:
        for thread in Path(f"/proc/{process.pid}/task").iterdir():
            if (thread / "comm").read_text().strip() != "gloo_tcp_loop":
                nanoseconds += int((thread / "schedstat").read_text().split()[0])
    return nanoseconds / 1e9


def test_idle_ranks_use_no_cpu(engine: Engine) -> None:
    engine.generate(input_ids=ids("the last one"), sampling_params=greedy(3))
    at_rest(engine)
    ranks = ranks_of_run(engine.run_dir)
    assert len(ranks) == 2
    before, began = cpu_seconds(ranks), time.monotonic()
    # Not to wait for something: this is the time that is measured.
    time.sleep(IDLE_SECONDS)
    used, passed = cpu_seconds(ranks) - before, time.monotonic() - began
    assert used < MAX_IDLE_SHARE * passed, f"{used:.3f} s of CPU in {passed:.1f} s"
