"""What the native API refuses, by name and with the reason, and fields of the dialect that it takes."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from support.engine_answers import GREEDY, ids
from support.native_api import generate, stream

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
