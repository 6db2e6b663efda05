"""`torchrun.sh route`: one address in front of an engine for prompts and one for what follows.

Every request that generates goes to both sides, with a room; the caller gets what the decode's side answers, piece by
piece. It holds no state: any number of routers may stand before the same engines.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec
import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..engine.config import ENGINE_OPTIONS
from ..engine.entrypoints.responses import wait_for_disconnect
from .run_dir import EXIT_USAGE

GENERATES = ("/generate", "/v1/completions", "/v1/chat/completions")
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
# The dialect's rooms have 63 bits.
ROOM_BITS = 63
CONNECT_TIMEOUT_S = 5.0
# Said for one hop, or made anew here.
HOP_HEADERS = frozenset(("host", "content-length", "transfer-encoding", "connection", "keep-alive", "expect"))


class Pair:
    """The two sides: a client for both, and the fields that tell the decode's side where the prefill's is."""

    def __init__(
        self,
        prefill: str,
        decode: str,
        bootstrap_host: str,
        bootstrap_port: int,
        client: httpx.AsyncClient | None = None,
    ) -> None:
        self.prefill, self.decode = prefill.rstrip("/"), decode.rstrip("/")
        self._host, self._port = bootstrap_host, bootstrap_port
        # An answer may take as long as it likes.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self.client = client or httpx.AsyncClient(timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S), limits=limits)

    def with_room(self, body: dict[str, Any]) -> dict[str, Any]:
        """The request with its room; the prompts of a batch count from it."""
        room = secrets.randbits(ROOM_BITS - 1)
        return {**body, "bootstrap_host": self._host, "bootstrap_port": self._port, "bootstrap_room": room}


def passed_on(headers: Any) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in HOP_HEADERS}


def bad_request(message: str) -> Response:
    body = {"error": {"message": message, "type": "BadRequestError", "param": "body", "code": 400}}
    return Response(msgspec.json.encode(body), 400, media_type="application/json")


def unreachable(side: str, error: Exception) -> Response:
    message = f"the {side}'s side cannot be reached: {error}"
    body = {"error": {"message": message, "type": "ServiceUnavailableError", "param": None, "code": 503}}
    return Response(msgspec.json.encode(body), 503, media_type="application/json")


async def generate(pair: Pair, http: Request) -> Response:
    """Both sides get the request. Where the prefill's side refuses it, that is the answer; else it is the decode's."""
    try:
        body = msgspec.json.decode(await http.body(), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return bad_request(f"body: must be a JSON object: {error}")
    content = msgspec.json.encode(pair.with_room(body))
    return Relay(pair.client, {"prefill": pair.prefill, "decode": pair.decode}, http, content)


async def forward(pair: Pair, http: Request) -> Response:
    """Anything else is for the decode's side."""
    return Relay(pair.client, {"decode": pair.decode}, http, await http.body())


class Relay(Response):
    """The answer to a request that one side or both are sent, piece by piece. When it ends, or its caller leaves, so do
    theirs: what still runs there is aborted."""

    def __init__(self, client: httpx.AsyncClient, urls: dict[str, str], http: Request, content: bytes) -> None:
        super().__init__()
        query = f"?{http.url.query}" if http.url.query else ""
        headers = passed_on(http.headers)
        self._client = client
        self._requests = {
            side: client.build_request(http.method, url + http.url.path + query, content=content, headers=headers)
            for side, url in urls.items()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        leaving = asyncio.create_task(wait_for_disconnect(receive))
        working = asyncio.create_task(self._relay(scope, receive, send))
        try:
            await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (working, leaving):
                task.cancel()
            results = await asyncio.gather(working, leaving, return_exceptions=True)
        if isinstance(results[0], Exception):
            raise results[0]

    async def _relay(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = {
            side: asyncio.create_task(self._client.send(request, stream=True))
            for side, request in self._requests.items()
        }
        try:
            await asyncio.wait(asked.values(), return_when=asyncio.FIRST_COMPLETED)
            side = next((side for side, asking in asked.items() if has_failed(asking)), "decode")
            try:
                answer = await asked[side]
            except httpx.HTTPError as error:
                await unreachable(side, error)(scope, receive, send)
                return
            try:
                await send_pieces(answer, send)
            except httpx.HTTPError as error:
                # The answer has begun: the server cuts the connection, as it does for a response without an end.
                message = f"the {side}'s side ended in the middle of an answer: {error}"
                print(f"torchrun.sh: {message}", file=sys.stderr, flush=True)
        finally:
            await asyncio.gather(*map(end, asked.values()))


async def send_pieces(answer: httpx.Response, send: Send) -> None:
    head = Response(status_code=answer.status_code, headers=passed_on(answer.headers))
    del head.headers["content-length"]
    await send({"type": "http.response.start", "status": head.status_code, "headers": head.raw_headers})
    async for piece in answer.aiter_raw():
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def has_failed(asking: asyncio.Task[httpx.Response]) -> bool:
    return asking.done() and (asking.exception() is not None or asking.result().is_error)


async def end(asking: asyncio.Task[httpx.Response]) -> None:
    """Let go of a side's answer."""
    asking.cancel()
    try:
        answer = await asking
    except (asyncio.CancelledError, httpx.HTTPError):
        return
    await answer.aclose()


async def health(pair: Pair) -> Response:
    """Both sides'."""
    for side, url in (("prefill", pair.prefill), ("decode", pair.decode)):
        try:
            answer = await pair.client.get(f"{url}/health", timeout=CONNECT_TIMEOUT_S)
        except httpx.HTTPError as error:
            return unreachable(side, error)
        if answer.is_error:
            return Response(answer.content, answer.status_code, passed_on(answer.headers))
    return Response()


def make_router(pair: Pair) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await pair.client.aclose()

    app = FastAPI(lifespan=lifespan, openapi_url=None)

    async def on_generate(http: Request) -> Response:
        return await generate(pair, http)

    async def on_health() -> Response:
        return await health(pair)

    async def on_other(http: Request) -> Response:
        return await forward(pair, http)

    for path in GENERATES:
        app.add_api_route(path, on_generate, methods=["POST", "PUT"])
    app.add_api_route("/health", on_health, methods=["GET"])
    app.add_api_route("/{path:path}", on_other, methods=METHODS)
    return app


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="torchrun.sh route", description="Stand before an engine for prompts and one for what follows."
    )
    parser.add_argument("--prefill", required=True, metavar="URL", help="server with --disaggregation prefill")
    parser.add_argument("--decode", required=True, metavar="URL", help="server with --disaggregation decode")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on")
    parser.add_argument(
        "--bootstrap-host",
        default=None,
        help="where the decode's side finds the prefill's; the URL's host if not given",
    )
    field = ENGINE_OPTIONS["disaggregation_bootstrap_port"]
    parser.add_argument("--bootstrap-port", type=int, default=field.default, help="that of the prefill's side")
    options = parser.parse_args(argv)
    host = options.bootstrap_host or urlsplit(options.prefill).hostname
    for name in ("prefill", "decode"):
        if urlsplit(getattr(options, name)).scheme not in ("http", "https"):
            print(f"torchrun.sh: error: --{name} {getattr(options, name)}: must be http://HOST:PORT", file=sys.stderr)
            return EXIT_USAGE
    pair = Pair(options.prefill, options.decode, host or "127.0.0.1", options.bootstrap_port)
    uvicorn.run(make_router(pair), host=options.host, port=options.port, log_level="warning")
    return 0
