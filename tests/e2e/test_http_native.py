"""The native API over HTTP, on two tensor-parallel ranks and the embedded model."""

from __future__ import annotations

import base64
import json

import httpx
import numpy as np
import pytest
from support.engine_answers import GREEDY, NUM_MOE_LAYERS, TOP_K, ids
from support.field_decoder import merge
from support.native_api import generate, int32_rows, state, stream
from support.same_rows import check_same_rows
from support.server_process import ServerProcess

from waybill.client import Client, Turn
from waybill.engine.entrypoints.native import META_HEADER
from waybill.engine.routing.transformers_reference import Reference
from waybill.engine.routing.wire import checksum


def test_int32_and_compact_say_the_same(http: httpx.Client) -> None:
    prompt = ids("two forms of one answer")
    wide = int32_rows(generate(http, input_ids=prompt))
    answer = generate(http, input_ids=prompt, routed_experts_format="compact")
    meta = answer["meta_info"]["routed_experts_meta"]
    raw = base64.b64decode(answer["meta_info"]["routed_experts"])
    rows = np.frombuffer(raw, np.uint8).reshape(meta["rows"], NUM_MOE_LAYERS, TOP_K)
    assert meta["checksum"] == checksum(raw)
    assert not wide[:, 0].any(), "layer 0 is dense"
    assert np.array_equal(wide[:, meta["layer_ids"]], rows)


def test_ten_turns_merge_to_one_full_answer(http: httpx.Client) -> None:
    """As the field's frameworks do it: start = len(previous tokens) - 1, existing[:start] + new."""
    tokens: list[int] = []
    routes: np.ndarray | None = None
    for turn in range(10):
        prompt = tokens + ids(f"turn {turn}: {'x' * turn}")
        start = max(0, len(tokens) - 1)
        answer = generate(http, input_ids=prompt, routed_experts_start_len=start)
        assert answer["meta_info"]["routed_experts_start_len"] == start
        routes = merge(routes, start, int32_rows(answer, start))
        tokens = prompt + answer["output_ids"]
        assert len(routes) == len(tokens) - 1
    full = generate(http, input_ids=tokens, sampling_params={"max_new_tokens": 0})
    # A prompt alone has rows for all but its last token, as the conversation has.
    assert routes is not None and int32_rows(full).tobytes() == routes.tobytes()


def test_the_client_holds_a_conversation(server: ServerProcess, http: httpx.Client) -> None:
    with Client(server.url) as client:
        for delivery in ("inline", "reference"):
            conversation = client.multi_turn(GREEDY, delivery=delivery)
            for turn in range(4):
                conversation.turn(ids(f"{delivery} turn {turn}"))
            tokens = conversation.tokens
            full = generate(http, input_ids=tokens, sampling_params={"max_new_tokens": 0})
            assert np.array_equal(int32_rows(full)[:, 1:], conversation.routes)


def test_a_session_says_where_its_rows_begin_and_the_client_stitches(server: ServerProcess, http: httpx.Client) -> None:
    """Ten turns, a branch of one and two choices: whatever came with each, the whole is what one answer has, combine
    weights to the bit. No other test has these words: each answer computes the last token of its prompt by itself."""

    def check(turn: Turn) -> None:
        full = generate(http, input_ids=turn.tokens, sampling_params={"max_new_tokens": 0}, return_router_weights=True)
        assert int32_rows(full)[:, 1:].tobytes() == turn.routes.astype("<i4").tobytes()
        assert turn.weights is not None
        assert base64.b64decode(full["meta_info"]["router_weights"]) == turn.weights.tobytes()

    with Client(server.url) as client:
        session = client.session("a tree of turns", GREEDY, return_router_weights=True)
        tokens: list[int] = []
        trunk = []
        for turn in range(10):
            (answer,) = session.turn(tokens + ids(f"tree, turn {turn}: {'y' * turn}"))
            assert answer.generation.meta is not None and answer.generation.meta.start == max(0, len(tokens) - 1)
            trunk.append(answer)
            tokens = answer.tokens
        check(trunk[-1])
        # It continues an early turn, whose last token the next one has fed.
        (branch,) = session.turn(trunk[2].tokens + ids("another way"))
        assert branch.generation.meta is not None and branch.generation.meta.start == len(trunk[2].tokens)
        check(branch)
        prompt = tokens + ids("two of them")
        first, second = session.turn(prompt, n=2)
        assert [each.generation.meta.start for each in (first, second) if each.generation.meta] == [
            len(tokens) - 1,
            len(prompt) - 1,
        ]
        assert np.array_equal(first.routes[: len(prompt) - 1], second.routes[: len(prompt) - 1])
        check(first)
    assert state(http)["num_route_sessions"] >= 1
    assert "\nwaybill_route_sessions " in http.get("/metrics").text


def test_a_claim_is_fetched_as_often_as_wanted_and_unknown_ones_are_gone(http: httpx.Client) -> None:
    prompt = ids("kept for later")
    answer = generate(http, input_ids=prompt, routed_experts_delivery="reference")
    assert "routed_experts" not in answer["meta_info"]
    for _ in range(2):
        reply = http.get(f"/routed_experts/{answer['meta_info']['routed_experts_claim']}")
        assert reply.headers["content-type"] == "application/octet-stream"
        assert json.loads(reply.headers[META_HEADER]) == answer["meta_info"]["routed_experts_meta"]
        assert checksum(reply.content) == answer["meta_info"]["routed_experts_meta"]["checksum"]
    gone = http.get("/routed_experts/0123456789abcdef")
    assert gone.status_code == 410
    assert "unknown" in gone.json()["error"]["message"]


def test_streamed_routes_join_to_the_whole_answer(http: httpx.Client) -> None:
    prompt = ids("rows as they come")
    for start in (0, 5, len(prompt)):
        fields = {"input_ids": prompt, "routed_experts_start_len": start, "routed_experts_format": "compact"}
        whole = generate(http, **fields)
        events = stream(http, sampling_params=GREEDY, return_routed_experts=True, stream_routed_experts=True, **fields)
        assert len(events) > 1
        joined = b"".join(base64.b64decode(event["meta_info"]["routed_experts"]) for event in events)
        position = start
        for event in events:
            assert event["meta_info"]["routed_experts_meta"]["start"] == position
            position += event["meta_info"]["routed_experts_meta"]["rows"]
        assert joined == base64.b64decode(whole["meta_info"]["routed_experts"])
        assert events[-1]["text"] == whole["text"] and events[-1]["output_ids"] == whole["output_ids"]


def test_a_stream_is_cumulative_and_ends_as_the_whole_answer(http: httpx.Client) -> None:
    prompt = ids("piece by piece")
    whole = generate(http, input_ids=prompt, return_logprob=True)
    events = stream(http, input_ids=prompt, sampling_params=GREEDY, return_routed_experts=True, return_logprob=True)
    texts = [event["text"] for event in events]
    assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:], strict=False))
    assert all("routed_experts" not in event["meta_info"] for event in events[:-1])
    for name in ("routed_experts", "finish_reason"):
        assert events[-1]["meta_info"][name] == whole["meta_info"][name]
    # One of the two found its prompt in the cache, and sums of other lengths round otherwise.
    pairs = [[logprob for logprob, _, _ in a["meta_info"]["output_token_logprobs"]] for a in (events[-1], whole)]
    assert pairs[0] == pytest.approx(pairs[1], abs=1e-4) and len(pairs[0]) == 6


def test_batches_samples_and_lists_of_starts(http: httpx.Client, reference: Reference) -> None:
    prompts = [ids("the first of two"), ids("and the second, longer one")]
    answers = generate(http, input_ids=prompts, routed_experts_start_len=[2, 20])
    for prompt, start, answer in zip(prompts, (2, 20), answers, strict=True):
        alone = generate(http, input_ids=prompt)
        # The dense layer's column apart, they are what the reference knows.
        rows = [each[:, 1:] for each in (int32_rows(answer, start), int32_rows(alone)[start:])]
        check_same_rows(reference, prompt + answer["output_ids"], *rows, start)
    samples = generate(http, input_ids=prompts[0], sampling_params={**GREEDY, "n": 3})
    assert len(samples) == 3 and len({answer["meta_info"]["routed_experts"] for answer in samples}) == 1
    mixed = generate(http, input_ids=prompts, return_routed_experts=[False, True])
    assert "routed_experts" not in mixed[0]["meta_info"] and "routed_experts" in mixed[1]["meta_info"]
    events = stream(http, input_ids=prompts, sampling_params=GREEDY)
    assert {event["index"] for event in events} == {0, 1}


def test_a_request_samples_the_same_tokens_whatever_its_neighbours_ask_for(http: httpx.Client) -> None:
    """Alone the ranks choose its tokens together, beside one with filters the leader samples; neighbours of several lengths
    come and go, so that both happen within a request. Log-probabilities agree to rounding."""
    mine = {"temperature": 1.3, "max_new_tokens": 40, "ignore_eos": True, "sampling_seed": 11}
    prompt = ids("sampled alone and in company")
    alone = generate(http, input_ids=prompt, sampling_params=mine, return_logprob=True)
    for asked in ({"top_p": 0.9}, {"repetition_penalty": 1.2}, {"min_new_tokens": 4}):
        others = [{"max_new_tokens": 5 + 9 * i, "ignore_eos": True, "sampling_seed": i, **asked} for i in range(3)]
        answers = generate(
            http,
            input_ids=[ids("a neighbour")] * 2 + [prompt, ids("another neighbour")],
            sampling_params=[*others[:2], mine, others[2]],
            return_logprob=True,
        )
        assert answers[2]["output_ids"] == alone["output_ids"], asked
        found, expected = (
            [value for value, _, _ in answer["meta_info"]["output_token_logprobs"]] for answer in (answers[2], alone)
        )
        assert len(found) == len(expected) == 40
        assert np.abs(np.array(found) - np.array(expected)).max() < 1e-4
