"""What the router answers, and what it sends to whom.

Whatever generates goes to a server for prompts and to one for what follows, with a room; the caller gets what the latter
answers. What asks without changing anything goes to one server for what follows. What changes an engine is refused.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec
from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from ..engine.entrypoints.api_keys import ApiKeys
from ..engine.entrypoints.bodies import CLIENT_GONE
from ..engine.entrypoints.errors import error_response, install_error_handlers, json_response
from ..engine.entrypoints.http_limits import HttpLimits
from ..engine.entrypoints.native import SESSION_HEADER
from ..engine.entrypoints.origin_guard import ANY, CHANGING_GETS, AllowedHosts, OriginGuard
from ..engine.entrypoints.request_guard import RequestGuard
from .router_metrics import render
from .router_relay import Attempt, Relay, to_side
from .router_sides import CONNECT_TIMEOUT_S, Side, Sides, said

GENERATES = ("/generate", "/v1/completions", "/v1/chat/completions")
# They generate without a room: the decode's side computes their prompts by itself.
GENERATES_ALONE = ("/generate/", "/chat", "/chat/", "/inference/v1/generate", "/skyrl/v1/generate")
ASKS = ("/tokenize", "/v1/tokenize", "/detokenize", "/v1/detokenize", "/v1/chat/completions/render")
ABORTS = ("/abort_request", "/abort_requests")
HEALTH = ("/health", "/health/", "/ping")
# Paths of the engines that say more, and how long they may take.
ENGINE_HEALTH = {"/ready": CONNECT_TIMEOUT_S, "/health_generate": 60.0}
# What a decode's side says to a claim that is another one's.
NOT_HERE = (404, 410)
# The dialect's rooms have 63 bits.
ROOM_BITS = 63


def with_room(body: dict[str, Any], prefill: Side) -> bytes:
    """The request as both sides get it; the prompts of a batch count from its room."""
    assert prefill.bootstrap is not None
    (host, port), room = prefill.bootstrap, secrets.randbits(ROOM_BITS - 1)
    return msgspec.json.encode({**body, "bootstrap_host": host, "bootstrap_port": port, "bootstrap_room": room})


def session_of(http: Request, body: dict[str, msgspec.Raw]) -> str | None:
    """As the engines read it; a batch has a list, and stays together."""
    session = bytes(body.get("session_id", b"null")).decode()
    return http.headers.get(SESSION_HEADER) if session == "null" else session.strip('"')


async def body_of(http: Request) -> dict[str, msgspec.Raw]:
    """
    Raises:
        ValueError: it is none that generates.
    """
    try:
        return msgspec.json.decode(await http.body(), type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"body: must be a JSON object: {error}") from None


class Router:
    def __init__(self, sides: Sides) -> None:
        self._sides = sides

    async def generate(self, http: Request) -> Response:
        """Both sides get the request. Where the prefill's side refuses it, that is the answer; else it is the decode's."""
        body = await body_of(http)
        return Relay(self._sides.client, http, self._pairs(body, session_of(http, body)))

    def _pairs(self, body: dict[str, msgspec.Raw], session: str | None) -> Iterator[Attempt]:
        """While there are others that are well."""
        sides = self._sides
        for number in itertools.count():
            prefill, decode = sides.choose(sides.prefills, session), sides.choose(sides.decodes, session)
            if number > 0 and (prefill.problem or decode.problem):
                return
            content = with_room(body, prefill)
            yield {prefill: content, decode: content}

    async def generate_alone(self, http: Request) -> Response:
        body = await body_of(http)
        return Relay(self._sides.client, http, self._decodes(await http.body(), session_of(http, body)))

    def _decodes(self, content: bytes, session: str | None) -> Iterator[Attempt]:
        for number in itertools.count():
            decode = self._sides.choose(self._sides.decodes, session)
            if number > 0 and decode.problem:
                return
            yield {decode: content}

    async def ask(self, http: Request) -> Response:
        """What one knows as well as another. Always the same one is asked."""
        content = await http.body()
        return Relay(self._sides.client, http, iter([{self._sides.first(self._sides.decodes): content}]))

    async def claim(self, http: Request) -> Response:
        """Rows wait where they were made."""
        attempts: list[Attempt] = [{side: b""} for side in self._sides.decodes]
        return Relay(self._sides.client, http, iter(attempts), NOT_HERE)

    async def abort(self, http: Request) -> Response:
        """Nobody knows here which side has the request. Who cannot be reached runs nothing any more."""
        content, client = await http.body(), self._sides.client
        asked = [client.send(to_side(http, side, content)) for side in self._sides.decodes]
        found = await asyncio.gather(*asked, return_exceptions=True)
        answers = [one for one in found if isinstance(one, httpx.Response)]
        if not answers:
            return error_response(f"no decode's side can be reached: {said(found[0])}", 503)  # type: ignore[arg-type]
        answer = next((one for one in answers if one.is_error), answers[0])
        return Response(answer.content, answer.status_code, media_type=answer.headers.get("content-type"))

    async def health(self) -> Response:
        return self._healthy(await self._sides.check())

    async def engine_health(self, http: Request) -> Response:
        path = http.url.path
        return self._healthy(await self._sides.check(path, ENGINE_HEALTH[path]))

    def _healthy(self, problem: str) -> Response:
        return error_response(problem, 503) if problem else Response()

    async def metrics(self) -> Response:
        return Response(render(self._sides), media_type=CONTENT_TYPE_LATEST)

    async def workers(self) -> Response:
        """As sglang's router lists them: trainers take from it where each engine is to be controlled."""
        found = [
            {
                "url": side.url,
                "worker_type": side.kind,
                "is_healthy": not side.problem,
                "load": side.num_running,
                "bootstrap_port": None if side.bootstrap is None else side.bootstrap[1],
            }
            for side in self._sides.all
        ]
        return json_response({"workers": found, "total": len(found)})

    async def list_workers(self) -> Response:
        return json_response({"urls": [side.url for side in self._sides.all]})

    async def other(self, http: Request) -> Response:
        """What may change something is nobody's: half of the engines would have changed."""
        if http.method in ("GET", "HEAD", "OPTIONS") and http.url.path not in CHANGING_GETS:
            return await self.ask(http)
        advice = "is not for a router; what changes an engine is asked of each at its own address"
        return error_response(f"{http.method} {http.url.path}: {advice}", 404)


def make_router(
    sides: Sides,
    *,
    api_keys: ApiKeys | None = None,
    allowed_hosts: AllowedHosts | None = None,
    limits: HttpLimits | None = None,
) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        probing = asyncio.create_task(sides.probe(), name="probe")
        yield
        probing.cancel()
        await sides.client.aclose()

    app, router = FastAPI(lifespan=lifespan, openapi_url=None, redirect_slashes=False), Router(sides)
    keys = ApiKeys(()) if api_keys is None else api_keys
    install_error_handlers(app)

    @app.exception_handler(ClientDisconnect)
    async def left(_: Request, error: ClientDisconnect) -> Response:
        """In the middle of its body: nobody reads this."""
        return Response(status_code=CLIENT_GONE)

    # The last one added is the first to see a request.
    app.add_middleware(RequestGuard, api_keys=keys, limits=limits or HttpLimits(), not_ready=lambda: None)
    if allowed_hosts is not None:
        # Which sites may use the engines these say themselves; the name by which the router is called they do not learn.
        app.add_middleware(OriginGuard, api_keys=keys, allowed_hosts=allowed_hosts, allowed_origins=(ANY,))
    for paths, handler, methods in (
        (GENERATES, router.generate, ["POST", "PUT"]),
        (GENERATES_ALONE, router.generate_alone, ["POST"]),
        (ASKS, router.ask, ["POST"]),
        (ABORTS, router.abort, ["POST"]),
        (HEALTH, router.health, ["GET", "HEAD"]),
        (ENGINE_HEALTH, router.engine_health, ["GET", "HEAD"]),
        (("/metrics",), router.metrics, ["GET"]),
        (("/workers",), router.workers, ["GET"]),
        (("/list_workers",), router.list_workers, ["GET"]),
        (("/routed_experts/{claim}",), router.claim, ["GET"]),
        (("/{path:path}",), router.other, ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]),
    ):
        for path in paths:
            app.add_api_route(path, handler, methods=methods)
    return app
