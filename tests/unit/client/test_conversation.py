"""Conversations of either client: turns join to what one answer has, and one that fails changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from support.fake_routes_server import (
    KINDS,
    PROMPT,
    TURNS,
    URL,
    FakeServer,
    ask,
    converse,
    more_tokens,
    no_rows,
    refusal,
    route_table,
    sample,
)

from waybill.client import AsyncClient, Client, Generation, History, RoutesError, ServerError


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("delivery", ["inline", "reference"])
def test_ten_turns_equal_one_shot(kind: str, delivery: str, server: FakeServer) -> None:
    seen: list[list[int]] = [[]]

    def check(conversation: History) -> None:
        assert len(conversation.routes) == len(conversation.tokens) - 1
        assert conversation.tokens[: len(seen[-1])] == seen[-1]
        seen.append(conversation.tokens)

    conversation = converse(kind, server, TURNS, check, delivery=delivery)
    assert len(conversation.tokens) == sum(map(len, TURNS)) + 3 * len(TURNS)
    assert [body["routed_experts_start_len"] for body in server.bodies] == [max(0, len(ids) - 1) for ids in seen[:-1]]
    assert [body["input_ids"] for body in server.bodies] == [a + b for a, b in zip(seen[:-1], TURNS, strict=True)]
    one_shot = ask(kind, server, conversation.tokens, {"max_new_tokens": 0})
    assert one_shot.routes is not None
    np.testing.assert_array_equal(conversation.routes, one_shot.routes[:-1])
    np.testing.assert_array_equal(conversation.routes, route_table(conversation.tokens)[:-1])


def test_a_turn_that_only_feeds_its_ids_brings_their_rows_once(server: FakeServer) -> None:
    """The last row of such a turn is there already when the next turn begins, and is not asked for again."""
    with Client(URL, transport=httpx.MockTransport(server)) as client:
        conversation = client.multi_turn({"max_new_tokens": 0})
        for turn in ([1, 2], [3], [], [4, 5]):
            conversation.turn(turn)
            assert len(conversation.routes) == len(conversation.tokens)
        assert [body["routed_experts_start_len"] for body in server.bodies] == [0, 2, 3, 3]
        np.testing.assert_array_equal(conversation.routes, route_table([1, 2, 3, 4, 5]))


def aborted(meta_info: dict[str, Any]) -> None:
    meta_info["finish_reason"] = {"type": "abort", "message": "by the caller"}


def other_layers(meta_info: dict[str, Any]) -> None:
    meta_info["routed_experts_meta"]["layer_ids"] = [0, 1, 2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_rows, "2 rows are missing"),
        (aborted, "aborted: by the caller"),
        (other_layers, "layers"),
        (more_tokens, "tokens, must be"),
    ],
)
def test_a_turn_that_fails_changes_nothing(
    kind: str, spoil: Callable[[dict[str, Any]], None], message: str, server: FakeServer
) -> None:
    held: list[History] = []

    def then_spoil(conversation: History) -> None:
        held.append(conversation)
        server.spoil = spoil

    with pytest.raises(RoutesError, match=message):
        converse(kind, server, TURNS, then_spoil)
    (conversation,) = held
    assert conversation.tokens == TURNS[0] + sample(TURNS[0], 3)
    np.testing.assert_array_equal(conversation.routes, route_table(conversation.tokens)[:-1])


def test_a_conversation_goes_on_after_a_failed_turn(server: FakeServer) -> None:
    with Client(URL, transport=httpx.MockTransport(server)) as client:
        conversation = client.multi_turn({"max_new_tokens": 3})
        conversation.turn(PROMPT)
        server.refusal = lambda: refusal(503, "the queue is full", Retry_After="1")
        with pytest.raises(ServerError):
            conversation.turn([1])
        server.refusal = None
        conversation.turn([1])
    assert conversation.tokens[:8] == [*PROMPT, *sample(PROMPT, 3), 1]
    np.testing.assert_array_equal(conversation.routes, route_table(conversation.tokens)[:-1])


def test_turns_at_once_are_refused(server: FakeServer) -> None:
    async def slow(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0.01)
        return server(request)

    async def both() -> tuple[History, list[Any]]:
        async with AsyncClient(URL, transport=httpx.MockTransport(slow)) as client:
            conversation = client.multi_turn({"max_new_tokens": 3})
            turns = (conversation.turn([1, 2]), conversation.turn([3]))
            return conversation, await asyncio.gather(*turns, return_exceptions=True)

    conversation, results = asyncio.run(both())
    (refused,) = [result for result in results if not isinstance(result, Generation)]
    assert isinstance(refused, RoutesError) and "one at a time" in str(refused)
    assert len(conversation.tokens) in (4, 5) and len(conversation.routes) == len(conversation.tokens) - 1
