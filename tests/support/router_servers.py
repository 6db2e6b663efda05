"""Servers that answer as they are told, before which a test puts a router."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import httpx
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from waybill.launch.router_app import make_router
from waybill.launch.router_sides import DECODE, PREFILL, Side, Sides


def answer(text: str, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"text": text}, status, headers)


class Server:
    """`asked` are the JSON bodies, and `requests` all requests, that it got."""

    def __init__(self, reply: Response, *, delay_s: float = 0.0, kind: str = "", is_there: bool = True) -> None:
        self.asked: list[dict[str, Any]] = []
        self.requests: list[Request] = []
        self.is_there = is_there
        self.app = FastAPI(redirect_slashes=False)

        @self.app.get("/health")
        async def health() -> Response:
            return Response(status_code=reply.status_code, headers={"X-Disaggregation": kind} if kind else {})

        @self.app.api_route("/{path:path}", methods=["GET", "HEAD", "POST", "PUT", "DELETE"])
        async def other(http: Request) -> Response:
            self.requests.append(http)
            if http.method in ("POST", "PUT"):
                self.asked.append(await http.json())
            await asyncio.sleep(delay_s)
            return reply

    @property
    def transport(self) -> httpx.AsyncBaseTransport:
        app = httpx.ASGITransport(self.app)

        async def ask(request: httpx.Request) -> httpx.Response:
            if not self.is_there:
                raise httpx.ConnectError("refused")
            return await app.handle_async_request(request)

        return httpx.MockTransport(ask)


class Routed:
    """A router before servers, which are called `http://p0`, `http://d0` and so on."""

    def __init__(self, prefills: Sequence[Server], decodes: Sequence[Server], **options: Any) -> None:
        servers = {f"http://p{i}": server for i, server in enumerate(prefills)}
        servers |= {f"http://d{i}": server for i, server in enumerate(decodes)}
        client = httpx.AsyncClient(mounts={url: server.transport for url, server in servers.items()})
        self.prefills = [Side(PREFILL, f"http://p{i}", ("10.0.0.1", 9000 + i)) for i in range(len(prefills))]
        self.decodes = [Side(DECODE, f"http://d{i}") for i in range(len(decodes))]
        self.app = make_router(Sides(self.prefills, self.decodes, client), **options)

    def run(self, work: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
        async def call() -> Any:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://r") as caller:
                return await work(caller)

        return asyncio.run(call())

    def ask(self, method: str = "POST", path: str = "/generate", **options: Any) -> httpx.Response:
        reply: httpx.Response = self.run(lambda caller: caller.request(method, path, **options))
        return reply


class Caller:
    """A program at the other end of an ASGI application: it reads an answer's pieces and leaves after the first."""

    def __init__(self, path: str, method: str = "GET", body: bytes = b"") -> None:
        self.scope = {
            "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"", "headers": [],
            "scheme": "http", "server": ("r", 80), "http_version": "1.1", "asgi": {"version": "3.0"},
        }  # fmt: skip
        self.pieces: list[bytes] = []
        self._body = body
        self._left = asyncio.Event()
        self._sent_body = False

    async def receive(self) -> dict[str, Any]:
        if not self._sent_body:
            self._sent_body = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if message.get("body"):
            self.pieces.append(message["body"])
            self._left.set()


class Feed(httpx.AsyncByteStream):
    """An answer of these pieces, which then ends with an error or, without one, never or at once."""

    def __init__(self, *pieces: bytes, error: Exception | None = None, is_endless: bool = True) -> None:
        self._pieces = pieces
        self._is_endless = is_endless
        self._error = error
        self.is_closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece
        if self._error is not None:
            raise self._error
        if self._is_endless:
            await asyncio.Event().wait()

    async def aclose(self) -> None:
        self.is_closed = True
