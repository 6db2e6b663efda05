"""The native API over HTTP, on two tensor-parallel ranks and the embedded model."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from support.field_decoder import decode_routed_experts, merge
from support.same_rows import check_same_rows
from support.server_process import ServerProcess

from waybill.client import Client, Turn
from waybill.engine.entrypoints.native import META_HEADER
from waybill.engine.routing.transformers_reference import Reference
from waybill.engine.routing.wire import checksum

NUM_LAYERS, NUM_MOE_LAYERS, TOP_K = 7, 6, 4
GREEDY = {"temperature": 0.0, "max_new_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60.0) as client:
        yield client


def ids(text: str) -> list[int]:
    return list(text.encode())


def generate(http: httpx.Client, **fields: Any) -> Any:
    reply = http.post("/generate", json={"sampling_params": GREEDY, "return_routed_experts": True, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


def stream(http: httpx.Client, path: str = "/generate", **fields: Any) -> list[Any]:
    """Events of a stream, which must end with [DONE]."""
    events = []
    with http.stream("POST", path, json={"stream": True, **fields}) as reply:
        assert reply.status_code == 200
        for line in reply.iter_lines():
            if line:
                assert line.startswith("data: ")
                events.append(line.removeprefix("data: "))
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def int32_rows(answer: Any, start: int = 0) -> np.ndarray:
    meta = answer["meta_info"]
    num_tokens = meta["prompt_tokens"] + meta["completion_tokens"]
    return decode_routed_experts(meta["routed_experts"], num_tokens, start, NUM_LAYERS, TOP_K)


def state(http: httpx.Client) -> dict[str, Any]:
    return http.get("/get_server_info").json()


def wait_until_idle(http: httpx.Client) -> None:
    deadline = time.monotonic() + 20
    while (now := state(http))["num_running"] or now["num_waiting"]:
        assert time.monotonic() < deadline, "requests still run"
        time.sleep(0.05)
    assert now["num_free_pages"] + now["num_cached_pages"] == now["num_pages"]


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


REFUSALS = [
    ({"routed_experts_start_len": 500}, "routed_experts_start_len=500 is higher than the number of input tokens"),
    ({"routed_experts_start_len": -1}, "routed_experts_start_len=-1 is lower than 0"),
    ({"sampling_params": {"max_new_tokens": 10**6}}, "max_new_tokens=1000000"),
    ({"input_ids": [5] * 5000}, "the prompt has 5000 tokens: must have at most 4096"),
    ({"input_ids": [999]}, "999 is no token"),
]


@pytest.mark.parametrize(("fields", "words"), REFUSALS)
def test_refusals_whole_and_streamed(http: httpx.Client, fields: dict[str, Any], words: str) -> None:
    body = {"input_ids": ids("x"), "return_routed_experts": True, **fields}
    reply = http.post("/generate", json=body)
    assert reply.status_code == 400
    assert words in reply.json()["error"]["message"]
    (event,) = stream(http, **body)
    reason = event["meta_info"]["finish_reason"]
    assert reason["type"] == "abort" and words in reason["message"]
    assert reason["status_code"] == 400 and reason["err_type"] == "BadRequestError"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"colour": "red"}, "colour"),
        ({"sampling_params": {"regex": "a("}}, "regex: "),
        ({"lora_path": "x"}, "lora_path is not supported"),
        ({"text": "x"}, "give exactly one"),
        ({"input_ids": ["a"]}, "input_ids.0"),
        ({"stream_routed_experts": True}, "stream_routed_experts: needs stream=true"),
        ({"text": "\ud800", "input_ids": None}, "UTF-8"),
    ],
)
def test_malformed_bodies_are_refused_by_name(http: httpx.Client, fields: dict[str, Any], words: str) -> None:
    body = json.dumps({"input_ids": ids("x"), **fields})
    reply = http.post("/generate", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400
    assert words in reply.json()["error"]["message"]


def test_neutral_fields_of_the_dialect_are_accepted(http: httpx.Client) -> None:
    generate(http, input_ids=ids("x"), lora_path=None, image_data=[], log_metrics=True, modalities=["text"])


def test_older_names_and_salt_of_the_dialect(http: httpx.Client) -> None:
    """Prompts of different salts share nothing, those of one do."""
    named = {
        "data_parallel_rank": 0,
        "routing_key": "k",
        "conversation_id": "c",
        "model": "m",
        "custom_labels": {"a": "b"},
    }
    prompt = {"input_ids": ids("a salted prompt, long enough to be cached"), "sampling_params": GREEDY}
    salts = (None, "s", "t", "s")
    answers = [generate(http, **prompt, **named, cache_salt=salt)["meta_info"]["cached_tokens"] for salt in salts]
    assert answers[1] == answers[2] == 0 and answers[3] > 0
    reply = http.post("/generate", json={**prompt, "data_parallel_rank": 3})
    assert reply.status_code == 400 and reply.json()["error"]["message"].startswith(
        "data_parallel_rank=3: must lie in 0"
    )


def test_one_bad_item_refuses_the_list_and_names_itself(http: httpx.Client) -> None:
    body = {"input_ids": [ids("good"), [-4], ids("good")], "sampling_params": GREEDY}
    reply = http.post("/generate", json=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].startswith("item 1: ")


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


def test_a_client_that_leaves_frees_its_pages(http: httpx.Client, server: ServerProcess) -> None:
    long = {"temperature": 0.0, "max_new_tokens": 3000, "ignore_eos": True}
    with (
        httpx.Client(base_url=server.url, timeout=60.0) as leaving,
        leaving.stream("POST", "/generate", json={"input_ids": ids("l"), "sampling_params": long, "stream": True}) as s,
    ):
        lines = s.iter_lines()
        next(lines)
        assert state(http)["num_running"] == 1
    wait_until_idle(http)
    with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=server.url, timeout=0.5) as impatient:
        impatient.post("/generate", json={"input_ids": ids("not streamed"), "sampling_params": long})
    wait_until_idle(http)


def test_a_rid_is_free_again_when_its_request_has_left_the_engine(http: httpx.Client, server: ServerProcess) -> None:
    """A client that leaves and comes back with the same rid is refused until the engine has let go, and then served."""
    body = {"input_ids": ids("again"), "rid": "re", "stream": True}
    for _ in range(10):
        with (
            httpx.Client(base_url=server.url, timeout=60.0) as leaving,
            leaving.stream(
                "POST", "/generate", json={**body, "sampling_params": {**GREEDY, "max_new_tokens": 300}}
            ) as s,
        ):
            lines = s.iter_lines()
            assert '"type":"abort"' not in next(lines)
        deadline = time.monotonic() + 20
        while "is in use" in (events := stream(http, **body, sampling_params=GREEDY))[-1]["meta_info"][
            "finish_reason"
        ].get("message", ""):
            assert time.monotonic() < deadline
        assert events[-1]["meta_info"]["finish_reason"]["type"] == "length"


@pytest.mark.parametrize("streaming", [True, False])
def test_of_requests_with_one_rid_one_runs(server: ServerProcess, streaming: bool) -> None:
    async def ask(client: httpx.AsyncClient) -> str:
        body = {"input_ids": ids("one of many"), "rid": "same", "stream": streaming, "sampling_params": GREEDY}
        return (await client.post("/generate", json=body)).text

    async def race() -> list[str]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60.0) as client:
            return await asyncio.gather(*(ask(client) for _ in range(8)))

    for _ in range(5):
        texts = asyncio.run(race())
        served = [text for text in texts if '"length"' in text]
        assert served and all("is in use" in text for text in texts if text not in served)


def test_an_abort_answers_with_what_there_is(http: httpx.Client) -> None:
    answers: list[Any] = []

    def ask() -> None:
        long = {"temperature": 0.0, "max_new_tokens": 3000, "ignore_eos": True}
        answers.append(generate(http, input_ids=ids("to be aborted"), rid="abort-me-1", sampling_params=long))

    thread = threading.Thread(target=ask)
    thread.start()
    while state(http)["num_running"] == 0:
        time.sleep(0.01)
    time.sleep(0.2)
    assert http.post("/abort_request", json={"rid": "abort-me", "abort_message": "too late"}).content == b""
    assert http.get("/v1/loads").json()["loads"][0]["num_total_reqs"] == 0, "an abort is answered when it has happened"
    thread.join(30)
    meta = answers[0]["meta_info"]
    assert meta["finish_reason"]["type"] == "abort" and meta["finish_reason"]["message"] == "too late"
    assert 0 < meta["completion_tokens"] < 3000
    assert len(int32_rows(answers[0])) == meta["prompt_tokens"] + meta["completion_tokens"] - 1


def test_control_and_information(http: httpx.Client) -> None:
    wait_until_idle(http)
    for method in ("GET", "POST"):
        assert http.request(method, "/flush_cache").json()["success"]
    now = state(http)
    assert now["num_free_pages"] == now["num_pages"] == now["kv_cache_tokens"]
    assert http.get("/health").status_code == http.get("/health_generate").status_code == 200
    assert http.get("/get_model_info").json() == http.get("/model_info").json()
    assert http.get("/model_info").json()["is_generation"]
    (card,) = http.get("/v1/models").json()["data"]
    assert card["max_model_len"] == 4096
    assert http.get(f"/v1/models/{card['id']}").json() == card
    assert http.get("/get_load").json()[0]["num_reqs"] == 0
    assert http.get("/ready").status_code == http.head("/health").status_code == 200
    assert http.post("/v1/responses", json={}).status_code == 501
    assert http.get("/v1/loads").json()["loads"][0]["num_running_reqs"] == 0
    assert http.get("/get_weight_version").json() == {"weight_version": "default"}
    tokens = http.post("/tokenize", json={"prompt": "12 + 3"}).json()
    assert tokens["count"] == 6 and tokens["max_model_len"] == 4096
    assert http.post("/detokenize", json={"tokens": tokens["tokens"]}).json()["text"] == "12 + 3"
    # An id of the model that the tokenizer does not have.
    assert http.post("/detokenize", json={"tokens": [50, 263, 51]}).json() == {"text": "23", "prompt": "23"}
    assert "999 is no token" in http.post("/detokenize", json={"tokens": [50, 999]}).text
    assert http.get("/nowhere").status_code == 404
    assert http.get("/generate").status_code == 405


def test_metrics_count_what_happened(http: httpx.Client) -> None:
    def read() -> dict[str, float]:
        lines = http.get("/metrics").text.splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}

    before = read()
    prompt = ids("counted once")
    answer = generate(http, input_ids=prompt)
    http.post("/generate", json={"input_ids": []})
    after = read()

    def grew(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grew('waybill_requests_total{outcome="length"}') == 1
    assert grew('waybill_requests_total{outcome="refused"}') == 1
    assert grew("waybill_prompt_tokens_total") == len(prompt)
    assert grew("waybill_output_tokens_total") == 6
    assert grew("waybill_routed_experts_rows_shipped_total") == len(int32_rows(answer))
    assert after["waybill_kv_pages"] == 16384


def test_every_request_leaves_a_line_with_its_rid(http: httpx.Client, server: ServerProcess) -> None:
    generate(http, input_ids=ids("logged"), rid="look-for-me")
    deadline = time.monotonic() + 10
    while not (lines := [line for line in server.lines if "look-for-me" in line]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    line = json.loads(lines[0])
    assert line["message"] == "request ended" and line["rid"] == "look-for-me" and line["outcome"] == "length"
