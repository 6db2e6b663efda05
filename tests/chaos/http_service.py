"""A server, `torchrun.sh serve`, and what its clients say."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np
from support.server_process import ServerProcess

from .run_place import RunPlace
from .service import HEARTBEAT_S, START_BOUND_S, WEIGHT_SYNC_S, Answer, GoneError, RefusedError, Shape

PATIENCE_S = 120.0
# Of the log, where something is wrong.
MAX_LINES = 12
MAX_LINE = 200
KEPT_CONNECTIONS = 4
OPTIONS = (
    *("--dtype", "float32", "--kv-cache-tokens", "8192", "--chunked-prefill-size", "64"),
    *("--heartbeat-timeout", str(HEARTBEAT_S), "--weight-sync-timeout", str(WEIGHT_SYNC_S)),
)


class HttpService:
    """See `Service`."""

    def __init__(
        self, shape: Shape, place: RunPlace, options: Sequence[str] = (), environment: dict[str, str] | None = None
    ) -> None:
        self.shape = shape
        self.place = place
        routing = ("--enable-return-routed-experts",) if shape.routing else ()
        self._server = ServerProcess(
            *("--tp", str(shape.tp), "--dp", str(shape.dp), *OPTIONS, *routing, *options),
            environment=place.environment | (environment or {}),
            prefix=place.prefix,
            wait=False,
        )
        self.http = httpx.AsyncClient()

    @property
    def address(self) -> tuple[str, int]:
        host, port = self._server.url.removeprefix("http://").split(":")
        return host, int(port)

    @property
    def num_log_lines(self) -> int:
        return len(self._server.lines)

    async def wait_until_ready(self) -> None:
        try:
            await asyncio.to_thread(self._server.wait_until_ready, START_BOUND_S)
        except AssertionError as error:
            raise GoneError(str(error)) from None
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=KEPT_CONNECTIONS)
        self.http = httpx.AsyncClient(base_url=self._server.url, timeout=PATIENCE_S, limits=limits)

    async def generate(self, request: dict[str, Any]) -> Answer:
        return answer_of(await self.post("/generate", request))

    async def stream(
        self, request: dict[str, Any], *, first: asyncio.Event | None = None, leave_after: int | None = None
    ) -> Answer:
        last, num_chunks = "", 0
        try:
            async with self.http.stream("POST", "/generate", json={**request, "stream": True}) as reply:
                if reply.status_code != 200:
                    await reply.aread()
                    raise RefusedError(reply.status_code, reply.text)
                async for line in reply.aiter_lines():
                    if line and line != "data: [DONE]":
                        last = line.removeprefix("data: ")
                        num_chunks += 1
                        if first is not None:
                            first.set()
                        if num_chunks == leave_after:
                            break
        except httpx.HTTPError as error:
            raise GoneError(repr(error)) from None
        if not last:
            raise GoneError("a stream without a chunk")
        chunk = json.loads(last)
        if "error" in chunk:
            raise RefusedError(chunk["error"]["code"], chunk["error"]["message"])
        return answer_of(chunk)

    async def control(self, name: str, **arguments: Any) -> None:
        await self.post(f"/{name}", arguments)

    async def info(self) -> dict[str, Any]:
        return await self._call("GET", "/get_server_info")

    async def abort(self, rid: str) -> None:
        await self.post("/abort_request", {"rid": rid})

    async def post(self, path: str, body: Any) -> Any:
        return await self._call("POST", path, json=body)

    async def _call(self, method: str, path: str, **options: Any) -> Any:
        try:
            reply = await self.http.request(method, path, **options)
        except httpx.HTTPError as error:
            raise GoneError(repr(error)) from None
        if reply.status_code != 200:
            raise RefusedError(reply.status_code, reply.text)
        return reply.json() if reply.content else None

    def tell_to_stop(self) -> None:
        self._server.process.terminate()

    async def wait_for_exit(self, timeout_s: float) -> int:
        try:
            return await asyncio.to_thread(self._server.process.wait, timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError from None

    def last_words(self) -> str:
        telling = [line[:MAX_LINE] for line in self._server.lines if '"level":"info"' not in line]
        return "\n".join(telling[-MAX_LINES:])


def answer_of(body: dict[str, Any]) -> Answer:
    meta = body["meta_info"]
    reason = meta["finish_reason"] or {"type": "unfinished"}
    if reason.get("status_code"):
        raise RefusedError(reason["status_code"], reason["message"])
    rows = None
    if meta.get("routed_experts") is not None:
        envelope = meta["routed_experts_meta"]
        shape = (envelope["rows"], envelope["num_layers"], envelope["top_k"])
        rows = np.frombuffer(base64.b64decode(meta["routed_experts"]), envelope["dtype"]).reshape(shape)
    return Answer(body["output_ids"], rows, reason)
