"""One engine computes prompts and another goes on with them: nobody can tell the two from one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from chaos.sides import shut
from support.engine_answers import at_rest, greedy, ids
from support.engine_pair import EnginePair
from support.process_tree import ranks_of_run
from support.reference_equality import LONG_ANSWER_TOLERANCE

from waybill import Engine
from waybill.engine.frontend.answer import GenerationError
from waybill.engine.routing.transformers_reference import LOGPROB_TOLERANCE, Reference
from waybill.engine.routing.wire import stitch

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "enable_return_routed_experts": True,
    "enable_return_router_weights": True,
    "kv_cache_tokens": 1024,
    "max_running_requests": 8,
    "chunked_prefill_size": 32,
}
NIXL = pytest.param(
    "nixl", marks=pytest.mark.skipif(find_spec("nixl") is None, reason="NIXL is not installed: the extra `nixl`")
)


@pytest.fixture(scope="module")
def pair(checkpoint: str) -> Iterator[EnginePair]:
    """Of page sizes that differ."""
    pair = EnginePair(checkpoint, {"tp_size": 2}, {"tp_size": 1, "page_size": 4, "kv_cache_tokens": 320}, **OPTIONS)
    yield pair
    pair.shutdown()


def check(
    reference: Reference, prompt: list[int], answer: dict[str, Any], tolerance: float = LOGPROB_TOLERANCE
) -> None:
    """Tokens, log-probabilities and rows."""
    meta = answer["meta_info"]
    assert "routed_experts_error" not in meta
    logprobs = [logprob for logprob, _, _ in meta["output_token_logprobs"]]
    reference.check_generation(prompt, answer["output_ids"], logprobs, meta["routed_experts"], tolerance)
    reference.check_weights(meta["router_weights"])


ALL = {"return_routed_experts": True, "return_router_weights": True, "return_logprob": True}


def test_single_chunked_cached_and_scored_prompts(pair: EnginePair, reference: Reference) -> None:
    short, long = ids("one chunk"), ids("a prompt that takes some chunks, " * 5)
    for prompt, start in ((short, -1), (long, -1), (long, -1), ([*long, 7, 7], 0)):
        answer = pair.generate(input_ids=prompt, sampling_params=greedy(6), logprob_start_len=start, **ALL)
        check(reference, prompt, answer)
    scored = pair.prefill.generate(input_ids=[*long, 7, 7], sampling_params=greedy(1), logprob_start_len=0, **ALL)
    assert answer["meta_info"]["input_token_logprobs"] == scored["meta_info"]["input_token_logprobs"]
    assert answer["meta_info"]["cached_tokens"] == 0, "positions that are scored are computed, and fetched, anew"
    states = [at_rest(pair.prefill), at_rest(pair.decode)]
    assert states[0]["num_transfers"] == states[1]["num_transfers"] > 0
    assert 2 * states[0]["transferred_bytes"] == states[1]["transferred_bytes"] > 0, "each rank sends its heads"
    assert all(state["transferred_shared_bytes"] == state["transferred_bytes"] for state in states)


def test_a_room_of_another_request_brings_no_pages(pair: EnginePair, reference: Reference) -> None:
    """As many tokens, but others: pages that came would be cached as those of a prompt that they are not of."""
    here, there = ids("asked of the decode"), ids("asked of prefill's")
    for other in ({"input_ids": [*there, 1]}, {"input_ids": here}):
        place = pair.place()
        lent = pair.submit(pair.prefill, sampling_params=greedy(4), **other, **place)
        with pytest.raises(GenerationError, match="is another request there: prompt, return_logprob"):
            pair.decode.generate(input_ids=here, sampling_params=greedy(4), logprob_start_len=0, **ALL, **place)
        lent.result()
    answer = pair.generate(input_ids=here, sampling_params=greedy(4), **ALL)
    assert answer["meta_info"]["cached_tokens"] == 0
    check(reference, here, answer)
    for engine in (pair.prefill, pair.decode):
        at_rest(engine)


def test_samples_streams_and_what_follows_the_first_token(pair: EnginePair, reference: Reference) -> None:
    """A sample's seed, penalties and grammar go on where the prefill has stopped."""
    prompt = ids("samples of one prompt: ")
    params = {"temperature": 1.0, "sampling_seed": 11, "max_new_tokens": 8, "ignore_eos": True}
    for more in ({"n": 3}, {"presence_penalty": 1.5}, {"regex": "[a-c]{4,6}"}):
        fields = {"input_ids": prompt, "sampling_params": {**params, **more}}
        # The prefill's side alone is an engine, too.
        one, two = pair.prefill.generate(**fields), pair.generate(**fields)
        of = [one], [two]
        for alone, both in zip(*(of if isinstance(one, dict) else (one, two)), strict=True):
            assert alone["output_ids"] == both["output_ids"]
    chunks = pair.stream(input_ids=prompt, sampling_params=greedy(5), stream_routed_experts=True, **ALL)
    rows = np.concatenate([chunk["meta_info"]["routed_experts"] for chunk in chunks])
    whole = pair.generate(input_ids=prompt, sampling_params=greedy(5), **ALL)
    assert len(chunks) >= 5 and chunks[-1]["output_ids"] == whole["output_ids"]
    assert np.array_equal(rows, whole["meta_info"]["routed_experts"])
    check(reference, prompt, whole)
    for num_tokens in (0, 1):
        answer = pair.generate(input_ids=prompt, sampling_params=greedy(num_tokens), return_routed_experts=True)
        assert answer["output_ids"] == whole["output_ids"][:num_tokens]
        assert np.array_equal(answer["meta_info"]["routed_experts"], rows[: len(prompt)])


def test_deltas_of_ten_turns(pair: EnginePair, reference: Reference) -> None:
    context, known = ids("turn by turn"), np.zeros((0, 6, 4), dtype=np.uint8)
    for turn in range(10):
        context, start = [*context, *ids(f" [{turn}] ")], len(known)
        answer = pair.generate(
            input_ids=context, sampling_params=greedy(3), routed_experts_start_len=start, session_id="s", **ALL
        )
        known = stitch(known, start, answer["meta_info"]["routed_experts"])
        context += answer["output_ids"]
    whole = pair.generate(input_ids=context, sampling_params=greedy(1), **ALL)
    assert np.array_equal(whole["meta_info"]["routed_experts"][: len(known)], known)
    check(reference, context, whole)


def test_retraction_where_the_decode_is(pair: EnginePair, reference: Reference) -> None:
    """More than its pool holds: requests wait for pages, or give them up and compute all again."""
    before = pair.decode.get_server_info()["num_retractions"]
    prompts = [ids(f"number {i} of those that want the pool for themselves. ") for i in range(4)]
    fields = [{"input_ids": prompt, "sampling_params": greedy(50), **ALL} for prompt in prompts]
    for prompt, answer in zip(prompts, pair.all(fields), strict=True):
        check(reference, prompt, answer, LONG_ANSWER_TOLERANCE)
    assert at_rest(pair.decode)["num_retractions"] > before
    at_rest(pair.prefill)


def test_aborts_free_both_sides_and_bad_rooms_are_refused(pair: EnginePair) -> None:
    prompt = {"input_ids": ids("to be aborted "), "sampling_params": greedy(200)}
    # Nobody computes the prompt; then nobody fetches it.
    for engine, other in ((pair.decode, pair.prefill), (pair.prefill, pair.decode)):
        place = pair.place()
        waiting = pair.submit(engine, rid="gone", **prompt, **place)
        while engine.get_server_info()["num_transferring"] == 0:
            time.sleep(0.01)
        with pytest.raises(GenerationError, match="another request has it"):
            engine.generate(**prompt, **place)
        engine.abort_request("gone")
        assert waiting.result()["meta_info"]["finish_reason"]["type"] == "abort"
        at_rest(engine)
        if engine is pair.prefill:
            with pytest.raises(GenerationError, match="prefill: aborted by request"):
                other.generate(**prompt, **place)
    with pytest.raises(ValueError, match="bootstrap_host: must be given"):
        pair.decode.generate(**prompt, bootstrap_room=1)
    with pytest.raises(ValueError, match="bootstrap_port: needs bootstrap_room"):
        pair.decode.generate(**prompt, bootstrap_port=1)


def test_weights_of_one_side_alone(pair: EnginePair) -> None:
    pair.decode.update_weight_version("new")
    with pytest.raises(
        GenerationError, match="weight_version: the prefill's side ran with 'default', this one has 'new'"
    ):
        pair.generate(input_ids=ids("which weights?"), sampling_params=greedy(3))
    pair.prefill.update_weight_version("new")
    answer = pair.generate(input_ids=ids("which weights?"), sampling_params=greedy(3), return_routed_experts=True)
    versions = answer["meta_info"]["routed_experts_meta"]["weight_versions"]
    assert answer["meta_info"]["weight_version"] == "new" and versions[-1][0] == "new"
    at_rest(pair.decode)
    at_rest(pair.prefill)


def test_memory_that_a_trainer_had_meanwhile(pair: EnginePair, reference: Reference) -> None:
    """The prefill's pool is given back and taken again, and is mapped by the decode's side before and after."""
    for engine in (pair.prefill, pair.decode):
        engine.release_memory_occupation(["kv_cache"])
        engine.resume_memory_occupation(["kv_cache"])
    prompt = ids("after the trainer: ")
    check(reference, prompt, pair.generate(input_ids=prompt, sampling_params=greedy(4), **ALL))


def test_a_connection_that_is_cut(pair: EnginePair, reference: Reference) -> None:
    """Who waits is told at once, and the next request makes another one."""
    waiting = pair.submit(pair.decode, input_ids=ids("cut off "), sampling_params=greedy(3), **pair.place())
    ranks = ranks_of_run(pair.decode.run_dir)
    connections = []
    while not connections:
        found = ranks[0].net_connections("tcp")
        connections = [one for one in found if one.raddr and one.raddr.port == pair.port]
    while pair.decode.get_server_info()["num_transferring"] == 0:
        time.sleep(0.01)
    for one in connections:
        shut(ranks[0].pid, one.fd)
    with pytest.raises(GenerationError, match="the connection has ended"):
        waiting.result()
    prompt = ids("another connection")
    check(reference, prompt, pair.generate(input_ids=prompt, sampling_params=greedy(4), **ALL))
    at_rest(pair.decode)


def test_the_prefill_dies_and_the_decode_goes_on(pair: EnginePair, reference: Reference) -> None:
    """Last: the other tests need it."""
    place = pair.place()
    waiting = pair.submit(pair.decode, input_ids=ids("whose prompt?"), sampling_params=greedy(3), **place)
    while pair.decode.get_server_info()["num_transferring"] == 0:
        time.sleep(0.01)
    pair.prefill.shutdown()
    began = time.monotonic()
    with pytest.raises(GenerationError, match="the connection has ended"):
        waiting.result()
    # The engine's own end takes some seconds.
    assert time.monotonic() - began < 15
    prompt = ids("alone now")
    check(reference, prompt, pair.decode.generate(input_ids=prompt, sampling_params=greedy(4), **ALL))
    at_rest(pair.decode)


@pytest.mark.matrix
@pytest.mark.parametrize("transport", ["shared", "tcp", NIXL])
@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        ({"tp_size": 1}, {"tp_size": 1}),
        ({"tp_size": 1}, {"tp_size": 2, "overlap_depth": 0}),
        ({"tp_size": 1}, {"tp_size": 1, "dp_size": 2}),
        ({"tp_size": 1, "dp_size": 2}, {"tp_size": 1, "dp_size": 2}),
        ({"tp_size": 2, "page_size": 3, "overlap_depth": 0}, {"tp_size": 2, "enable_prefix_cache": False}),
    ],
)
def test_other_layouts(
    checkpoint: str, reference: Reference, prefill: dict[str, Any], decode: dict[str, Any], transport: str
) -> None:
    pair = EnginePair(checkpoint, prefill, decode, **OPTIONS, disaggregation_transport=transport)
    prompts = [ids(f"prompt {i} of several, " * (1 + i % 3)) for i in range(6)]
    fields = [{"input_ids": prompt, "sampling_params": greedy(8), **ALL} for prompt in (*prompts, *prompts)]
    try:
        answers = pair.all(fields)
        for prompt, answer in zip((*prompts, *prompts), answers, strict=True):
            check(reference, prompt, answer)
        for engine in (pair.prefill, pair.decode):
            state = at_rest(engine)
            for name in ("shared", "nixl"):
                assert state[f"transferred_{name}_bytes"] == (state["transferred_bytes"] if transport == name else 0)
    finally:
        pair.shutdown()


@pytest.mark.matrix
def test_log_probabilities_of_prompts_where_nobody_records_rows(checkpoint: str) -> None:
    """They go between output processors, too; in a stream before the first token's."""
    options = {**OPTIONS, "enable_return_routed_experts": False, "enable_return_router_weights": False}
    # Where positions are cached, float32 rounds the others otherwise.
    options["enable_prefix_cache"] = False
    pair = EnginePair(checkpoint, {"tp_size": 1}, {"tp_size": 1, "dp_size": 2}, **options)
    scored = {"return_logprob": True, "logprob_start_len": 3, "top_logprobs_num": 2}
    fields = [{"input_ids": ids(f"scored {i}, " * 9), "sampling_params": greedy(4), **scored} for i in range(4)]
    try:
        answers = [pair.generate(**one) for one in fields]
        chunks = pair.stream(**fields[0])
        alone = [pair.prefill.generate(**one) for one in fields]
        plain = pair.generate(input_ids=ids("not scored"), sampling_params=greedy(4))
        for engine in (pair.prefill, pair.decode):
            at_rest(engine)
    finally:
        pair.shutdown()
    assert len(plain["output_ids"]) == 4
    for both, one in zip(answers, alone, strict=True):
        for name in ("input_token_logprobs", "input_token_ranks", "input_top_logprobs"):
            assert both["meta_info"][name] == one["meta_info"][name], name
    first = chunks[0]["meta_info"]
    assert len(first["output_token_logprobs"]) >= 1
    assert first["input_token_logprobs"] == alone[0]["meta_info"]["input_token_logprobs"]


@pytest.mark.matrix
@pytest.mark.parametrize("transport", ["auto", "tcp", NIXL])
def test_with_equal_layouts_nobody_can_tell_the_pair_from_one(
    checkpoint: str, reference: Reference, transport: str
) -> None:
    check_nobody_can_tell(checkpoint, reference, transport, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("transport", ["shared", "tcp"])
def test_nobody_can_tell_on_two_gpus(checkpoint: str, transport: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 CUDA devices")
    check_nobody_can_tell(checkpoint, Reference(checkpoint, "cuda"), transport, "cuda")


def check_nobody_can_tell(checkpoint: str, reference: Reference, transport: str, device: str) -> None:
    """One request after the other: tokens, log-probabilities, rows and weights are equal to the bit, cached or not."""
    prompts = [ids(f"prompt {i} of several, " * (1 + i % 3)) for i in range(4)]
    fields = [{"input_ids": prompt, "sampling_params": greedy(8), **ALL} for prompt in prompts]
    fields += [{**one, "logprob_start_len": 5, "top_logprobs_num": 2} for one in fields]
    options = {**OPTIONS, "device": device}
    pair = EnginePair(checkpoint, {"tp_size": 1}, {"tp_size": 1}, **options, disaggregation_transport=transport)
    try:
        both = [pair.generate(**one) for one in (*fields, *fields)]
        state = at_rest(pair.decode)
    finally:
        pair.shutdown()
    assert state["transferred_shared_bytes"] == (state["transferred_bytes"] if transport in ("auto", "shared") else 0)
    for one, two in zip((*fields, *fields), both, strict=True):
        check(reference, one["input_ids"], two)
    with Engine(checkpoint, tp_size=1, **options) as engine:
        for one, two in zip((engine.generate(**one) for one in (*fields, *fields)), both, strict=True):
            assert one["output_ids"] == two["output_ids"]
            for name in one["meta_info"].keys() - {"id", "e2e_latency"}:
                assert np.array_equal(one["meta_info"][name], two["meta_info"][name]), name
