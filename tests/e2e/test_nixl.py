"""Keys and values over NIXL: what one engine answers, and bounded errors where one side goes. UCX has sockets alone here,
as between hosts without RDMA; within a host it would read the other process's memory."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
from support.engine_answers import at_rest, greedy, ids
from support.engine_pair import EnginePair
from support.process_tree import ranks_of_run

from waybill.engine.frontend.answer import GenerationError
from waybill.engine.routing.transformers_reference import Reference

pytestmark = [
    pytest.mark.matrix,
    pytest.mark.skipif(find_spec("nixl") is None, reason="NIXL is not installed: the extra `nixl`"),
]
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "enable_return_routed_experts": True,
    "kv_cache_tokens": 1024,
    "max_running_requests": 8,
    "chunked_prefill_size": 32,
    "disaggregation_transport": "nixl",
    "disaggregation_timeout_s": 20.0,
    "heartbeat_timeout_s": 120.0,
}
ALL = {"return_routed_experts": True, "return_logprob": True}


@pytest.fixture(scope="module")
def pair(checkpoint: str) -> Iterator[EnginePair]:
    """Of page sizes and tensor parallelism that differ: each rank has half of the heads that the other side's have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UCX_TLS", "tcp")
        pair = EnginePair(checkpoint, {"tp_size": 1}, {"tp_size": 2, "page_size": 4}, **OPTIONS)
    yield pair
    pair.shutdown()


def check(reference: Reference, prompt: list[int], answer: dict[str, Any]) -> None:
    """Tokens, log-probabilities and rows."""
    meta = answer["meta_info"]
    logprobs = [logprob for logprob, _, _ in meta["output_token_logprobs"]]
    reference.check_generation(prompt, answer["output_ids"], logprobs, meta["routed_experts"])


def test_prompts_of_one_and_of_several_chunks_and_cached_ones(pair: EnginePair, reference: Reference) -> None:
    prompts = [ids("one chunk"), ids("a prompt that takes some chunks, " * 5)]
    fields = [{"input_ids": prompt, "sampling_params": greedy(6), **ALL} for prompt in (*prompts, *prompts)]
    for one, answer in zip(fields, [*pair.all(fields[:2]), *pair.all(fields[2:])], strict=True):
        check(reference, one["input_ids"], answer)
    for engine in (pair.prefill, pair.decode):
        state = at_rest(engine)
        assert state["transferred_nixl_bytes"] == state["transferred_bytes"] > 0


def test_memory_that_a_trainer_had_meanwhile(pair: EnginePair, reference: Reference) -> None:
    """The pool of the prefill's side is another agent's afterwards."""
    for engine in (pair.prefill, pair.decode):
        engine.release_memory_occupation(["kv_cache"])
        engine.resume_memory_occupation(["kv_cache"])
    prompt = ids("after the trainer: ")
    check(reference, prompt, pair.generate(input_ids=prompt, sampling_params=greedy(4), **ALL))


def test_the_prefill_is_stopped_for_longer_than_anybody_waits(pair: EnginePair, reference: Reference) -> None:
    """Whatever of it was on its way then, the request fails within a bound; both go on afterwards."""
    prompt = ids("stopped in the middle of it, " * 20)
    fields = {"input_ids": prompt, "sampling_params": greedy(4), **ALL, **pair.place()}
    waiting = [pair.submit(engine, **fields) for engine in (pair.decode, pair.prefill)]
    ranks = ranks_of_run(pair.prefill.run_dir)
    began = pair.decode.get_server_info()["transferred_nixl_bytes"]
    while pair.decode.get_server_info()["transferred_nixl_bytes"] == began and not waiting[0].done():
        time.sleep(0.002)
    for rank in ranks:
        rank.send_signal(signal.SIGSTOP)
    try:
        stopped_at = time.monotonic()
        error = waiting[0].exception(30)
        assert error is None or isinstance(error, GenerationError)
        assert time.monotonic() - stopped_at < 25
        alone = ids("alone meanwhile")
        check(reference, alone, pair.decode.generate(input_ids=alone, sampling_params=greedy(4), **ALL))
    finally:
        for rank in ranks:
            rank.send_signal(signal.SIGCONT)
    waiting[1].exception(30)
    at_rest(pair.decode)
    at_rest(pair.prefill)
    prompt = ids("both again")
    check(reference, prompt, pair.generate(input_ids=prompt, sampling_params=greedy(4), **ALL))


def test_the_prefill_dies_and_the_decode_goes_on(pair: EnginePair, reference: Reference) -> None:
    """Last: the other tests need it."""
    prompt = ids("killed in the middle of it, " * 20)
    fields = {"input_ids": prompt, "sampling_params": greedy(4), **ALL, **pair.place()}
    waiting = [pair.submit(engine, **fields) for engine in (pair.decode, pair.prefill)]
    while pair.decode.get_server_info()["num_transferring"] == 0 and not waiting[0].done():
        time.sleep(0.002)
    for rank in ranks_of_run(pair.prefill.run_dir):
        rank.kill()
    error = waiting[0].exception(30)
    assert error is None or isinstance(error, GenerationError)
    assert waiting[1].exception(30) is not None or error is None
    prompt = ids("alone now")
    check(reference, prompt, pair.decode.generate(input_ids=prompt, sampling_params=greedy(4), **ALL))
    at_rest(pair.decode)
