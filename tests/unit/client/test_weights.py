"""Combine weights in the client: numbers beside the routes, verified and joined as these are."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

from waybill.client import Client, RoutesError
from waybill.engine.frontend.session_routes import SessionRoutes
from waybill.engine.routing import wire
from waybill.engine.routing.geometry import RouteGeometry

GEOMETRY = RouteGeometry((1, 2), 3, 8, 2, 64, "bfloat16")
URL = "http://waybill.test"
PARAMS = {"max_new_tokens": 3}


def rows_of(tokens: list[int]) -> np.ndarray:
    """Ids [R, M, K], of all tokens up to there."""
    sums = np.cumsum(np.array(tokens) + 1)
    return ((sums[:, None] + np.arange(4)) % 64).astype(np.uint8).reshape(-1, 2, 2)


def weights_of(tokens: list[int]) -> np.ndarray:
    """Numbers that bfloat16 has."""
    return rows_of(tokens).astype(np.float32) / 64


class Server:
    def __init__(self) -> None:
        self.sessions = SessionRoutes(10, 10_000)
        self.spoil: Callable[[dict[str, Any]], None] = lambda meta: None

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        prompt, num = body["input_ids"], body["sampling_params"].get("n", 1)
        start, session = body["routed_experts_start_len"], body.get("session_id")
        if start == "auto":
            start = min(self.sessions.num_delivered(session, np.array(prompt)), len(prompt) - 1)
        answers = [self._answer(body, start, choice) for choice in range(num)]
        for choice, answer in enumerate(answers if session else []):
            tokens = np.array((prompt + answer["output_ids"])[:-1], np.int32)
            self.sessions.add(session, tokens, len(prompt) - 1 if choice else start)
        return httpx.Response(200, json=answers if num > 1 else answers[0])

    def _answer(self, body: dict[str, Any], start: int, choice: int) -> dict[str, Any]:
        prompt = body["input_ids"]
        output = [choice, *((sum(prompt) + i) % 50 for i in range(2))]
        first = len(prompt) - 1 if choice else start
        routed = wire.encode(rows_of(prompt + output)[first:-1], first, GEOMETRY, [])
        meta: dict[str, Any] = {
            "finish_reason": {"type": "length", "length": 3},
            "prompt_tokens": len(prompt),
            "completion_tokens": 3,
            "cached_tokens": 0,
            "routed_experts": base64.b64encode(routed.frame).decode(),
            "routed_experts_meta": msgspec.to_builtins(routed.meta),
        }
        if choice:
            meta["routed_experts_prefix"] = {"choice": 0, "start": start, "end": first}
        if body.get("return_router_weights"):
            values = wire.weight_bits(weights_of(prompt + output)[first:-1], "bfloat16")
            weights = wire.encode_weights(values, first, GEOMETRY, [])
            meta["router_weights"] = base64.b64encode(weights.frame).decode()
            meta["router_weights_meta"] = msgspec.to_builtins(weights.meta)
        self.spoil(meta)
        return {"text": "", "output_ids": output, "meta_info": meta}


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def client(server: Server) -> Client:
    return Client(URL, transport=httpx.MockTransport(server))


def test_weights_are_float32_of_the_same_rows(client: Client) -> None:
    got = client.generate([1, 2, 3], PARAMS, start_len=1, return_router_weights=True)
    assert got.routes is not None and got.weights is not None and got.weights.dtype == np.float32
    tokens = [1, 2, 3, *got.output_ids]
    assert np.array_equal(got.routes, rows_of(tokens)[1:-1])
    assert np.array_equal(got.weights, weights_of(tokens)[1:-1])
    assert client.generate([1, 2, 3], PARAMS).weights is None


def test_a_conversation_joins_them(client: Client) -> None:
    conversation = client.multi_turn(PARAMS, return_router_weights=True)
    for turn in ([1, 2], [3], [4, 5, 6]):
        conversation.turn(turn)
        assert conversation.weights is not None
        assert np.array_equal(conversation.weights, weights_of(conversation.tokens)[:-1])
    plain = client.multi_turn(PARAMS)
    plain.turn([1])
    assert plain.weights is None


def test_a_session_joins_them_over_turns_and_choices(client: Client) -> None:
    session = client.session("s", PARAMS, return_router_weights=True)
    (first,) = session.turn([1, 2, 3])
    both = session.turn([*first.tokens, 9], n=2)
    (branch,) = session.turn([*both[1].tokens, 8])
    assert [len(turn.generation.routes) for turn in (first, *both, branch)] == [5, 4, 3, 4]  # type: ignore[arg-type]
    for turn in (first, *both, branch):
        assert turn.weights is not None
        assert np.array_equal(turn.routes, rows_of(turn.tokens)[:-1])
        assert np.array_equal(turn.weights, weights_of(turn.tokens)[:-1])


def test_a_session_that_began_without_them_says_so(client: Client) -> None:
    (first,) = client.session("s", PARAMS).turn([1, 2, 3])
    other = client.session("s", PARAMS, return_router_weights=True)
    other._branches = [(np.array(first.tokens[:-1]), (first.routes,))]
    with pytest.raises(RoutesError, match=r"rows were .*uint8.*, now .*uint8.*float32"):
        other.turn([*first.tokens, 4])


def drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda meta: meta.pop(name)


def set_in(folder: str, name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda meta: meta[folder].update({name: value})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (drop("router_weights"), "expected router_weights in meta_info"),
        (drop("router_weights_meta"), "expected router_weights_meta in meta_info"),
        (lambda meta: meta.update(router_weights="*"), "router_weights: expected base64"),
        (lambda meta: meta.update(router_weights="AAAA"), "router weights: 3 bytes arrived"),
        (set_in("router_weights_meta", "checksum", "crc32:00000000"), "router weights: checksum"),
        (set_in("router_weights_meta", "start", 1), "does not fit that of the ids"),
        (set_in("router_weights_meta", "dtype", "float8"), "float8"),
        (
            lambda meta: meta.update(routed_experts=None, routed_experts_error="2 rows are missing"),
            "2 rows are missing",
        ),
    ],
)
def test_wrong_weights_raise(server: Server, client: Client, spoil: Any, words: str) -> None:
    server.spoil = spoil
    with pytest.raises(RoutesError, match=words):
        client.generate([1, 2, 3], PARAMS, return_router_weights=True)
