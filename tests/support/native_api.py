"""The native API as a client of HTTP asks it: one answer or a stream, rows, and what the server says of itself."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import numpy as np

from .engine_answers import GREEDY, NUM_LAYERS, TOP_K
from .field_decoder import decode_routed_experts


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
