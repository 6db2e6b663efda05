"""What a request must pass before any handler sees it."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.responses import Response

from waybill.engine.entrypoints.errors import install_error_handlers
from waybill.engine.entrypoints.gate import Gate
from waybill.engine.entrypoints.service_metrics import ServiceMetrics


def ask(method: str, path: str, *, key: str | None = None, reason: str | None = None, **request: Any) -> httpx.Response:
    app = FastAPI()
    install_error_handlers(app, ServiceMetrics())
    app.add_middleware(Gate, api_key=key, max_body_bytes=10, not_ready=lambda: reason)

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
    assert ask("POST", "/size", key="k").status_code == 401
    assert ask("POST", "/size", key="k", headers={"Authorization": "Bearer k"}).status_code == 200
    assert ask("POST", "/size", key="k", headers={"Authorization": "Basic k"}).status_code == 401
    assert ask("GET", "/health", key="k").text == "well"


def test_an_engine_that_is_not_ready_is_503() -> None:
    reply = ask("POST", "/size", reason="the engine is starting")
    assert reply.status_code == 503 and "Retry-After" in reply.headers
