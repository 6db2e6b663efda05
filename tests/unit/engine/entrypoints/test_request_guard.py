"""What a request must pass before any handler sees it."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from waybill.engine.entrypoints.api_keys import ApiKeys
from waybill.engine.entrypoints.bounded_body import BodyBudget, BoundedBody, attach, release_body
from waybill.engine.entrypoints.errors import install_error_handlers
from waybill.engine.entrypoints.http_limits import HttpLimits
from waybill.engine.entrypoints.request_guard import RequestGuard

LIMITS = HttpLimits(max_body_bytes=10, max_inflight_body_bytes=15, body_timeout_s=0.2)


def ask(method: str, path: str, *keys: str, reason: str | None = None, **request: Any) -> httpx.Response:
    app = FastAPI()
    install_error_handlers(app)
    app.add_middleware(RequestGuard, api_keys=ApiKeys(keys), limits=LIMITS, not_ready=lambda: reason)

    @app.post("/size")
    async def size(http: Request) -> Response:
        return Response(str(len(await http.body())))

    @app.get("/health")
    async def health() -> Response:
        return Response("well")

    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gate") as client:
            return await client.request(method, path, **request)

    return asyncio.run(call())


def test_a_body_of_bearable_size_passes() -> None:
    assert ask("POST", "/size", content=b"x" * 10).text == "10"


async def pieces() -> Any:
    for _ in range(3):
        yield b"x" * 4


@pytest.mark.parametrize("content", [b"x" * 11, pieces()], ids=["stated", "chunked"])
def test_a_larger_one_is_413(content: Any) -> None:
    reply = ask("POST", "/size", content=content)
    assert reply.status_code == 413 and "10 bytes" in reply.json()["error"]["message"]


def test_a_key_opens_all_but_health() -> None:
    assert ask("POST", "/size", "k").status_code == 401
    assert ask("POST", "/size", "k", headers={"Authorization": "Bearer k"}).status_code == 200
    assert ask("POST", "/size", "k", headers={"Authorization": "Basic k"}).status_code == 401
    assert ask("GET", "/health", "k").text == "well"


def test_an_engine_that_is_not_ready_is_503() -> None:
    reply = ask("POST", "/size", reason="the engine is starting")
    assert reply.status_code == 503 and "Retry-After" in reply.headers


@pytest.mark.parametrize("key", ["first", "zweiter", "schlüssel-日本"])
def test_any_of_several_keys_opens(key: str) -> None:
    keys = ("first", "zweiter", "schlüssel-日本")
    assert ask("POST", "/size", *keys, headers={"Authorization": f"Bearer {key}".encode()}).status_code == 200
    for wrong in (key[:-1], key + "x", "", key.upper()):
        assert ask("POST", "/size", *keys, headers={"Authorization": f"Bearer {wrong}".encode()}).status_code == 401


def test_a_body_in_pieces_must_come_in_time() -> None:
    async def slow() -> Any:
        yield b"x"
        await asyncio.sleep(5)

    reply = ask("POST", "/size", content=slow())
    assert reply.status_code == 408 and reply.headers["Connection"] == "close"
    assert "--body-timeout" in reply.json()["error"]["message"]


def test_bytes_count_from_their_arrival_to_their_release() -> None:
    """Not from when they are announced."""

    async def run() -> None:
        budget = BodyBudget(15)

        def body(*pieces: bytes) -> BoundedBody:
            events = iter([{"type": "http.request", "body": piece, "more_body": True} for piece in pieces])

            async def receive() -> Any:
                return next(events)

            return BoundedBody(receive, LIMITS, budget)

        first, second = body(b"x" * 8), body(b"x" * 7, b"x")
        await first()
        await second()
        assert budget.held_bytes == 15
        with pytest.raises(HTTPException) as refusal:
            await second()
        assert refusal.value.status_code == 503
        scope = {"type": "http"}
        attach(scope, second)
        release_body(Request(scope))
        assert budget.held_bytes == 8
        second.release()
        assert budget.held_bytes == 8
        assert (await body(b"x" * 7)())["body"] == b"x" * 7

    asyncio.run(run())


def test_bytes_of_a_request_that_fails_are_given_back() -> None:
    async def run() -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            assert gate._budget.held_bytes == 3
            raise RuntimeError("no")

        async def receive() -> Any:
            return {"type": "http.request", "body": b"abc", "more_body": False}

        gate = RequestGuard(app, api_keys=ApiKeys(()), limits=LIMITS, not_ready=lambda: None)
        with pytest.raises(RuntimeError):
            await gate({"type": "http", "path": "/", "headers": []}, receive, receive)
        assert gate._budget.held_bytes == 0

    asyncio.run(run())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_connections": 0}, "--max-connections 0"),
        ({"max_body_bytes": 0}, "--max-body-bytes 0"),
        ({"max_body_bytes": 10, "max_inflight_body_bytes": 9}, "--max-inflight-body-bytes 9"),
        ({"max_header_bytes": 10}, "--max-header-bytes 10"),
        ({"header_timeout_s": 0.0}, "--header-timeout 0.0"),
        ({"body_timeout_s": float("inf")}, "--body-timeout inf"),
        ({"write_timeout_s": float("nan")}, "--write-timeout nan"),
        ({"keep_alive_timeout_s": -1.0}, "--keep-alive-timeout -1.0"),
    ],
)
def test_limits_out_of_range_name_their_flag(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        HttpLimits(**fields)
