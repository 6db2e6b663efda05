"""What a server says of itself: state, model, tokens, metrics and its log."""

from __future__ import annotations

import json
import time

import httpx
from support.engine_answers import ids
from support.native_api import generate, int32_rows, state, wait_until_idle
from support.server_process import ServerProcess


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
