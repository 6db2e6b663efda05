"""The client against a fake server whose routes are a function of position and token: what is wrong is never handed on."""

from __future__ import annotations

import asyncio
import base64
import copy
import functools
import json
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

from waybill.client import AsyncClient, Client, Generation, History, RoutesError, ServerError
from waybill.engine.routing import wire
from waybill.engine.routing.geometry import RouteGeometry

GEOMETRY = RouteGeometry(layer_ids=(1, 2, 4), num_layers_total=5, max_tokens=8, top_k=2, num_experts=64)
URL = "http://waybill.test/prefix"
KINDS = ("sync", "async")
PROMPT = [5, 6, 7, 8]
TURNS = [[10 * turn + offset for offset in range(1 + turn % 4)] for turn in range(1, 11)]


def route_table(tokens: list[int]) -> np.ndarray:
    """Rows [len(tokens), M, K]: row i depends on i and token i alone."""
    layers, slots = np.array(GEOMETRY.layer_ids)[:, None], np.arange(GEOMETRY.top_k)
    return np.stack([(7 * i + 3 * token + 5 * layers + slots) % 64 for i, token in enumerate(tokens)]).astype(np.uint8)


def sample(tokens: list[int], count: int) -> list[int]:
    ids: list[int] = []
    for _ in range(count):
        ids.append((31 * sum(tokens + ids) + len(tokens + ids)) % 1000)
    return ids


class FakeServer:
    """Answers as the contract says; `spoil` changes an answer before it goes out, `refusal` replaces it."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[httpx.Headers] = []
        self.claims: dict[str, wire.RoutedExperts] = {}
        self.finish: dict[str, Any] = {"type": "length", "length": 3}
        self.num_missing = 0
        self.spoil: Callable[[dict[str, Any]], None] = lambda meta_info: None
        self.spoil_block: Callable[[wire.RoutedExperts], wire.RoutedExperts] = lambda routed: routed
        self.refusal: Callable[[], httpx.Response] | None = None

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.headers.append(request.headers)
        path = request.url.path.removeprefix("/prefix")
        if path.startswith("/routed_experts/"):
            return self._block(path.removeprefix("/routed_experts/"))
        assert (request.method, path) == ("POST", "/generate")
        self.bodies.append(json.loads(request.content))
        return self.refusal() if self.refusal else self._answer(self.bodies[-1])

    def _answer(self, body: dict[str, Any]) -> httpx.Response:
        prompt = body["input_ids"] if "input_ids" in body else [ord(char) for char in body["text"]]
        output = sample(prompt, body["sampling_params"].get("max_new_tokens", 3))
        meta_info: dict[str, Any] = {
            "id": body.get("rid", "r"),
            "finish_reason": self.finish,
            "prompt_tokens": len(prompt),
            "completion_tokens": len(output),
            "cached_tokens": 1,
        }
        if body["return_routed_experts"]:
            assert body["routed_experts_format"] == "compact"
            meta_info |= self._routing(body, prompt + output, len(prompt + output) - bool(output))
        self.spoil(meta_info)
        return httpx.Response(200, json={"text": f"{len(output)} ids", "output_ids": output, "meta_info": meta_info})

    def _routing(self, body: dict[str, Any], tokens: list[int], num_inputs: int) -> dict[str, Any]:
        end = num_inputs - self.num_missing
        start = min(body["routed_experts_start_len"], end)
        routed = wire.encode(route_table(tokens)[start:end], start, GEOMETRY, [("v0", start, end)])
        fields = {"routed_experts_meta": msgspec.to_builtins(routed.meta), "routed_experts_start_len": start}
        if body["routed_experts_delivery"] == "reference":
            claim = f"claim/{len(self.claims)}?#"
            self.claims[claim] = routed
            return fields | {"routed_experts_claim": claim}
        return fields | {"routed_experts": base64.b64encode(routed.frame).decode("ascii")}

    def _block(self, claim: str) -> httpx.Response:
        if claim not in self.claims:
            return refusal(410, "the claim has expired")
        routed = self.spoil_block(self.claims[claim])
        meta = msgspec.json.encode(routed.meta).decode("ascii")
        return httpx.Response(200, content=bytes(routed.frame), headers={"X-Routed-Experts-Meta": meta})


def refusal(status: int, message: str, **headers: str) -> httpx.Response:
    error = {"message": message, "type": "BadRequestError", "param": None, "code": status}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.Response(status, json={"error": error}, headers=named)


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


def ask(kind: str, server: FakeServer, *args: Any, **fields: Any) -> Generation:
    """`generate` of either client."""

    async def ask_async() -> Generation:
        async with AsyncClient(URL, api_key="secret", transport=httpx.MockTransport(server)) as client:
            return await client.generate(*args, **fields)

    if kind == "async":
        return asyncio.run(ask_async())
    with Client(URL, api_key="secret", transport=httpx.MockTransport(server)) as client:
        return client.generate(*args, **fields)


def converse(
    kind: str, server: FakeServer, turns: list[list[int]], check: Callable[[History], None], **fields: Any
) -> History:
    """A conversation of either client; `check` sees it after every turn."""

    async def converse_async() -> History:
        async with AsyncClient(URL, transport=httpx.MockTransport(server)) as client:
            conversation = client.multi_turn({"max_new_tokens": 3}, **fields)
            for ids in turns:
                await conversation.turn(ids)
                check(conversation)
            return conversation

    if kind == "async":
        return asyncio.run(converse_async())
    with Client(URL, transport=httpx.MockTransport(server)) as client:
        conversation = client.multi_turn({"max_new_tokens": 3}, **fields)
        for ids in turns:
            conversation.turn(ids)
            check(conversation)
        return conversation


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("delivery", ["inline", "reference"])
@pytest.mark.parametrize("start", [0, 2, len(PROMPT)])
def test_generate(kind: str, delivery: str, start: int, server: FakeServer) -> None:
    params = {"max_new_tokens": 3, "temperature": 0.5}
    got = ask(kind, server, PROMPT, params, start_len=start, delivery=delivery, rid="mine")
    expected = sample(PROMPT, 3)
    assert got.output_ids == expected and got.text == "3 ids"
    assert got.finish_reason == server.finish and (got.prompt_tokens, got.cached_tokens) == (4, 1)
    assert got.raw["id"] == "mine" and server.bodies[0]["sampling_params"] == params
    assert got.routes is not None and got.meta is not None
    assert got.routes.dtype == np.uint8
    np.testing.assert_array_equal(got.routes, route_table(PROMPT + expected)[start:-1])
    assert (got.meta.start, got.meta.rows, got.meta.weight_versions) == (start, 6 - start, [("v0", start, 6)])
    assert len(server.claims) == (delivery == "reference")
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret"}


@pytest.mark.parametrize("kind", KINDS)
def test_generate_from_text_and_without_routes(kind: str, server: FakeServer) -> None:
    got = ask(kind, server, text="abc", routed_experts=False)
    assert got.output_ids == sample([97, 98, 99], 3)
    assert got.routes is None and got.meta is None
    assert "input_ids" not in server.bodies[0]


def test_ids_of_numpy_are_sent_as_they_are(server: FakeServer) -> None:
    ask("sync", server, np.array(PROMPT))
    assert server.bodies[0]["input_ids"] == PROMPT


@pytest.mark.parametrize("start", [0, 3, 4])
@pytest.mark.parametrize("delivery", ["inline", "reference"])
def test_prefill_only_has_the_row_of_every_token(start: int, delivery: str, server: FakeServer) -> None:
    got = ask("sync", server, PROMPT, {"max_new_tokens": 0}, start_len=start, delivery=delivery)
    assert got.routes is not None and got.meta is not None
    np.testing.assert_array_equal(got.routes, route_table(PROMPT)[start:])
    assert (got.meta.start, got.meta.rows) == (start, 4 - start)
    server.num_missing = 1
    with pytest.raises(RoutesError, match="expected rows"):
        ask("sync", server, PROMPT, {"max_new_tokens": 0}, start_len=0, delivery=delivery)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"input_ids": PROMPT, "text": "abc"}, "exactly one"),
        ({"input_ids": "abc"}, "text by its name"),
        ({"input_ids": PROMPT, "sampling_params": {"n": 2}}, "n=2"),
        ({"input_ids": PROMPT, "stream": True}, "stream"),
        ({"input_ids": PROMPT, "routed_experts_format": "int32"}, "routed_experts_format"),
    ],
)
def test_what_cannot_be_asked_is_not_sent(arguments: dict[str, Any], message: str, server: FakeServer) -> None:
    with pytest.raises(ValueError, match=message):
        ask("sync", server, **arguments)
    assert server.bodies == []


# --- conversations --------------------------------------------------------------------------------------------------


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


def no_rows(meta_info: dict[str, Any]) -> None:
    meta_info |= {"routed_experts": None, "routed_experts_error": "2 rows are missing"}


def aborted(meta_info: dict[str, Any]) -> None:
    meta_info["finish_reason"] = {"type": "abort", "message": "by the caller"}


def other_layers(meta_info: dict[str, Any]) -> None:
    meta_info["routed_experts_meta"]["layer_ids"] = [0, 1, 2]


def more_tokens(meta_info: dict[str, Any]) -> None:
    """An answer that is consistent, but for more tokens than it has."""
    tokens = [0] * (meta_info["prompt_tokens"] + 4)
    meta_info["completion_tokens"] = 4
    start = meta_info["routed_experts_meta"]["start"]
    routed = wire.encode(route_table(tokens)[start:-1], start, GEOMETRY, [])
    meta_info["routed_experts_meta"] = msgspec.to_builtins(routed.meta)
    meta_info["routed_experts"] = base64.b64encode(routed.frame).decode("ascii")


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


# --- answers that are wrong -----------------------------------------------------------------------------------------


def wrong_checksum(meta_info: dict[str, Any]) -> None:
    meta_info["routed_experts_meta"]["checksum"] = "crc32:00000000"


def flipped_bit(meta_info: dict[str, Any]) -> None:
    raw = bytearray(base64.b64decode(meta_info["routed_experts"]))
    raw[5] ^= 1
    meta_info["routed_experts"] = base64.b64encode(raw).decode()


def cut_short(meta_info: dict[str, Any]) -> None:
    meta_info["routed_experts"] = base64.b64encode(base64.b64decode(meta_info["routed_experts"])[:-6]).decode()


def wrong_start(meta_info: dict[str, Any]) -> None:
    meta_info["routed_experts_meta"]["start"] += 1


def no_base64(meta_info: dict[str, Any]) -> None:
    meta_info["routed_experts"] = "*" + meta_info["routed_experts"]


def unknown_dtype(meta_info: dict[str, Any]) -> None:
    meta_info["routed_experts_meta"]["dtype"] = "float8"


def without(*path: str) -> Callable[[dict[str, Any]], None]:
    def remove(meta_info: dict[str, Any]) -> None:
        *folders, name = path
        for folder in folders:
            meta_info = meta_info[folder]
        del meta_info[name]

    return remove


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (wrong_checksum, "checksum crc32:[0-9a-f]+, the envelope states crc32:00000000"),
        (flipped_bit, "checksum"),
        (cut_short, "30 bytes arrived, the envelope states 36"),
        (wrong_start, "from position 0 on, they start at 1"),
        (no_base64, "base64"),
        (unknown_dtype, "float8"),
        (no_rows, "2 rows are missing"),
        (without("routed_experts"), "routed_experts in meta_info"),
        (without("routed_experts_meta"), "routed_experts_meta in meta_info"),
        (without("routed_experts_meta", "checksum"), "checksum"),
        (without("prompt_tokens"), "prompt_tokens"),
        (without("completion_tokens"), "completion_tokens"),
        (without("finish_reason"), "finish_reason"),
    ],
)
def test_wrong_answers_raise(
    kind: str, spoil: Callable[[dict[str, Any]], None], message: str, server: FakeServer
) -> None:
    assert ask(kind, server, PROMPT).routes is not None
    server.spoil = spoil
    with pytest.raises(RoutesError, match=message):
        ask(kind, server, PROMPT)


@pytest.mark.parametrize("delivery", ["inline", "reference"])
def test_short_rows_are_for_aborted_requests_only(delivery: str, server: FakeServer) -> None:
    server.num_missing = 2
    with pytest.raises(RoutesError, match=r"expected rows \[1, 6\), \[1, 4\) arrived"):
        ask("sync", server, PROMPT, start_len=1, delivery=delivery)
    server.finish = {"type": "abort", "message": "by the caller"}
    got = ask("sync", server, PROMPT, start_len=1, delivery=delivery)
    assert got.routes is not None and len(got.routes) == 3
    server.num_missing = -1
    server.spoil = more_tokens_than_said
    with pytest.raises(RoutesError, match=r"expected rows \[0, 6\), \[0, 7\) arrived"):
        ask("sync", server, PROMPT)


def more_tokens_than_said(meta_info: dict[str, Any]) -> None:
    more_tokens(meta_info)
    meta_info["completion_tokens"] = 3


def test_what_is_no_single_answer_raises(server: FakeServer) -> None:
    for content in (b"[]", b"{}", b"data: {}", b"\xff"):
        server.refusal = functools.partial(httpx.Response, 200, content=content)
        with pytest.raises(RoutesError, match="the answer"):
            ask("sync", server, PROMPT)


def flip_in_block(routed: wire.RoutedExperts) -> wire.RoutedExperts:
    return wire.RoutedExperts(routed.rows ^ 1, routed.meta)


def block_of_another(routed: wire.RoutedExperts) -> wire.RoutedExperts:
    """Intact and of the same form, but not what the answer announced."""
    return wire.encode(routed.rows ^ 1, routed.meta.start, GEOMETRY, routed.meta.weight_versions)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("spoil_block", "message"), [(flip_in_block, "checksum"), (block_of_another, "the answer states .* its claim")]
)
def test_wrong_blocks_raise(kind: str, spoil_block: Any, message: str, server: FakeServer) -> None:
    server.spoil_block = spoil_block
    with pytest.raises(RoutesError, match=message):
        ask(kind, server, PROMPT, delivery="reference")


def test_a_block_needs_its_claim_and_envelope(server: FakeServer) -> None:
    server.spoil = without("routed_experts_claim")
    with pytest.raises(RoutesError, match="routed_experts_claim in meta_info"):
        ask("sync", server, PROMPT, delivery="reference")
    server.spoil = no_rows
    with pytest.raises(RoutesError, match="2 rows are missing"):
        ask("sync", server, PROMPT, delivery="reference")
    server.spoil = lambda meta_info: None
    server._block = lambda claim: httpx.Response(200, content=bytes(server.claims[claim].frame))  # type: ignore[method-assign]
    with pytest.raises(RoutesError, match="X-Routed-Experts-Meta"):
        ask("sync", server, PROMPT, delivery="reference")


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("response", "status", "message", "retry_after_s"),
    [
        (
            lambda: refusal(400, "routed_experts_start_len=9 is higher"),
            400,
            "routed_experts_start_len=9 is higher",
            None,
        ),
        (lambda: refusal(503, "the queue is full", Retry_After="7"), 503, "the queue is full", 7.0),
        (lambda: refusal(503, "later", Retry_After="Fri, 31 Dec 1999 23:59:59 GMT"), 503, "later", None),
        (lambda: httpx.Response(502, text="<html>bad gateway</html>"), 502, "<html>bad gateway</html>", None),
        (lambda: httpx.Response(500), 500, "Internal Server Error", None),
        (lambda: httpx.Response(307, headers={"Location": "/elsewhere"}), 307, "Temporary Redirect", None),
    ],
)
def test_refusals(
    kind: str,
    response: Callable[[], httpx.Response],
    status: int,
    message: str,
    retry_after_s: float | None,
    server: FakeServer,
) -> None:
    server.refusal = response
    with pytest.raises(ServerError) as caught:
        ask(kind, server, PROMPT)
    error = caught.value
    assert (error.status, error.message, error.retry_after_s) == (status, message, retry_after_s)
    assert str(error) == f"HTTP {status}: {message}"
    # Trainers pass errors between processes, which copies them by the same protocol.
    assert str(copy.copy(error)) == str(error)


@pytest.mark.parametrize("kind", KINDS)
def test_an_expired_claim(kind: str, server: FakeServer) -> None:
    server.spoil = lambda meta_info: server.claims.clear()
    with pytest.raises(ServerError, match="HTTP 410: the claim has expired"):
        ask(kind, server, PROMPT, delivery="reference")
