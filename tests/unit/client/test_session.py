"""Sessions of the client: parts are put together where the server says, and what does not fit is never handed on."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

from waybill.client import AsyncClient, Client, RoutesError, Turn
from waybill.engine.frontend.session_routes import SessionRoutes
from waybill.engine.routing import wire
from waybill.engine.routing.geometry import RouteGeometry

GEOMETRY = RouteGeometry(layer_ids=(1, 2), num_layers_total=3, max_tokens=8, top_k=2, num_experts=64)
URL = "http://waybill.test"
NEW = 3


def rows_of(tokens: list[int]) -> np.ndarray:
    sums = np.cumsum(np.array(tokens) + 1)
    return ((sums[:, None] + np.arange(4)) % 64).astype(np.uint8).reshape(-1, 2, 2)


class SessionServer:
    """Answers "auto" as the contract says; `spoil` changes the answers before they go out."""

    def __init__(self) -> None:
        self.sessions = SessionRoutes(10, 10_000)
        self.spoil: Callable[[list[dict[str, Any]]], None] = lambda answers: None

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        assert body["routed_experts_start_len"] == "auto" and body["routed_experts_format"] == "compact"
        prompt, num = body["input_ids"], body["sampling_params"].get("n", 1)
        start = min(self.sessions.num_delivered(body["session_id"], np.array(prompt)), len(prompt) - 1)
        answers = [self._answer(prompt, start, choice) for choice in range(num)]
        for choice, answer in enumerate(answers):
            tokens = np.array((prompt + answer["output_ids"])[:-1], np.int32)
            self.sessions.add(body["session_id"], tokens, len(prompt) - 1 if choice else start)
        self.spoil(answers)
        return httpx.Response(200, json=answers if num > 1 else answers[0])

    def _answer(self, prompt: list[int], start: int, choice: int) -> dict[str, Any]:
        output = [choice, *((sum(prompt) + i) % 50 for i in range(NEW - 1))]
        first = len(prompt) - 1 if choice else start
        routed = wire.encode(rows_of(prompt + output)[first:-1], first, GEOMETRY, [])
        meta: dict[str, Any] = {
            "finish_reason": {"type": "length", "length": NEW},
            "prompt_tokens": len(prompt),
            "completion_tokens": NEW,
            "cached_tokens": 0,
            "routed_experts": base64.b64encode(routed.frame).decode(),
            "routed_experts_meta": msgspec.to_builtins(routed.meta),
        }
        if choice:
            meta["routed_experts_prefix"] = {"choice": 0, "start": start, "end": first}
        return {"text": "", "output_ids": output, "meta_info": meta}


Ask = Callable[..., list[Turn]]


def with_session(kind: str, server: SessionServer, check: Callable[[Ask], None]) -> None:
    """`check` gets `turn` of a session of either client."""
    transport = httpx.MockTransport(server)
    if kind == "sync":
        with Client(URL, transport=transport) as client:
            check(client.session("s", {"temperature": 0}).turn)
        return
    client = AsyncClient(URL, transport=transport)
    session = client.session("s", {"temperature": 0})
    with asyncio.Runner() as runner:
        check(lambda *args, **fields: runner.run(session.turn(*args, **fields)))
        runner.run(client.close())


def check_whole(turn: Turn) -> None:
    assert np.array_equal(turn.routes, rows_of(turn.tokens)[:-1])


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_tree_of_turns_has_the_rows_of_all_its_branches(kind: str) -> None:
    def check(turn: Ask) -> None:
        (first,) = turn([1, 2, 3])
        one, two, three = turn([*first.tokens, 4, 5], n=3)
        (deep,) = turn([*two.tokens, 6])
        (edited,) = turn([1, 2, 9, 9])
        (again,) = turn([1, 2, 3])
        for each in (first, one, two, three, deep, edited, again):
            check_whole(each)
        starts = [each.generation.meta.start for each in (first, one, two, three, deep, edited, again)]
        assert starts == [0, 5, 7, 7, 10, 2, 2]

    with_session(kind, SessionServer(), check)


def test_a_session_that_the_server_forgot_goes_on() -> None:
    server = SessionServer()

    def check(turn: Ask) -> None:
        (first,) = turn([1, 2, 3])
        server.sessions = SessionRoutes(10, 10_000)
        (second,) = turn([*first.tokens, 4])
        assert second.generation.meta is not None and second.generation.meta.start == 0
        check_whole(second)

    with_session("sync", server, check)


def test_rows_that_another_got_are_missed() -> None:
    server = SessionServer()

    def another(turn: Ask) -> None:
        check_whole(turn([1, 2, 3])[0])

    def check(turn: Ask) -> None:
        with pytest.raises(RoutesError, match="rows 0 to 2 are missing, in session 's'"):
            turn([1, 2, 3])
        # Another beginning is nobody's.
        check_whole(turn([9, 9, 9])[0])

    with_session("sync", server, another)
    with_session("sync", server, check)


def without_prefix(answers: list[dict[str, Any]]) -> None:
    del answers[1]["meta_info"]["routed_experts_prefix"]


def other_choice(answers: list[dict[str, Any]]) -> None:
    answers[1]["meta_info"]["routed_experts_prefix"]["choice"] = 1


def other_start(answers: list[dict[str, Any]]) -> None:
    answers[1]["meta_info"]["routed_experts_prefix"]["start"] = 1


def beyond(answers: list[dict[str, Any]]) -> None:
    answers[1]["meta_info"]["routed_experts_prefix"]["end"] = 99


def one_lost(answers: list[dict[str, Any]]) -> None:
    del answers[1]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without_prefix, "begin at 2, nothing says who has the others"),
        (other_choice, "refers to rows of another, which are not there"),
        (other_start, "refers to rows of another, which are not there"),
        (beyond, "refers to rows of another, which are not there"),
        (one_lost, "expected 2 answers, 1 came"),
    ],
)
def test_choices_that_do_not_fit_are_refused(spoil: Callable[[list[dict[str, Any]]], None], words: str) -> None:
    server = SessionServer()
    server.spoil = spoil

    def check(turn: Ask) -> None:
        with pytest.raises(RoutesError, match=words):
            turn([1, 2, 3], n=2)

    with_session("sync", server, check)
