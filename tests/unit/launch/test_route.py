"""The router before two engines: both get a request with one room, the caller what the decode's side answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from waybill.launch.route import Pair, main, make_router


class Side:
    """A server that answers as it is told, and remembers what it was asked."""

    def __init__(self, answer: Response, delay_s: float = 0.0) -> None:
        self.asked: list[dict[str, Any]] = []
        self.app = FastAPI()

        @self.app.api_route("/generate", methods=["POST", "PUT"])
        async def generate(http: Request) -> Response:
            self.asked.append(await http.json())
            await asyncio.sleep(delay_s)
            return answer

        @self.app.get("/health")
        @self.app.get("/server_info")
        async def health() -> Response:
            return answer


def ask(prefill: Side, decode: Side, method: str = "POST", path: str = "/generate", **options: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        mounts = {f"http://{name}": httpx.ASGITransport(side.app) for name, side in (("p", prefill), ("d", decode))}
        async with httpx.AsyncClient(mounts=mounts) as client:
            router = make_router(Pair("http://p/", "http://d", "10.0.0.1", 8998, client))
            async with httpx.AsyncClient(transport=httpx.ASGITransport(router), base_url="http://r") as caller:
                return await caller.request(method, path, **options)

    return asyncio.run(run())


def answer(text: str, status: int = 200) -> Response:
    return JSONResponse({"text": text}, status)


def test_both_are_asked_and_the_decode_answers() -> None:
    prefill, decode = Side(answer("first")), Side(answer("all"), delay_s=0.01)
    reply = ask(prefill, decode, json={"text": "a", "stream": False})
    assert reply.status_code == 200 and reply.json() == {"text": "all"}
    (one,), (two,) = prefill.asked, decode.asked
    assert one == two and one["bootstrap_host"] == "10.0.0.1" and one["bootstrap_port"] == 8998
    assert 0 <= one["bootstrap_room"] < 2**63 and one["text"] == "a"


def test_a_stream_passes_through() -> None:
    decode = Side(StreamingResponse(iter(["data: 1\n\n", "data: [DONE]\n\n"]), media_type="text/event-stream"))
    reply = ask(Side(answer("first"), delay_s=1.0), decode, json={"text": "a", "stream": True})
    assert reply.text == "data: 1\n\ndata: [DONE]\n\n" and reply.headers["content-type"].startswith("text/event-stream")


def test_the_refusal_of_either_side_is_the_answer() -> None:
    refusing, waiting = Side(answer("no", 400)), Side(answer("late"), delay_s=5.0)
    assert ask(refusing, waiting, json={}).json() == {"text": "no"}
    assert ask(waiting, refusing, json={}).status_code == 400
    reply = ask(refusing, waiting, content=b"[")
    assert reply.status_code == 400 and "must be a JSON object" in reply.json()["error"]["message"]


def test_health_is_that_of_both_and_the_rest_is_the_decodes() -> None:
    good, bad = Side(answer("good")), Side(answer("bad", 503))
    statuses = [ask(*sides, "GET", "/health").status_code for sides in ((good, good), (bad, good), (good, bad))]
    assert statuses == [200, 503, 503]
    assert ask(good, Side(answer("decode")), "GET", "/server_info").json() == {"text": "decode"}
    assert json.loads(ask(good, good, "GET", "/nothing").content) == {"detail": "Not Found"}


class Caller:
    """One that reads an answer's pieces and leaves after the first."""

    def __init__(self, path: str) -> None:
        self.scope = {
            "type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": [],
            "scheme": "http", "server": ("r", 80), "http_version": "1.1", "asgi": {"version": "3.0"},
        }  # fmt: skip
        self.pieces: list[bytes] = []
        self._left = asyncio.Event()
        self._sent_body = False

    async def receive(self) -> dict[str, Any]:
        if not self._sent_body:
            self._sent_body = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if message.get("body"):
            self.pieces.append(message["body"])
            self._left.set()


class Endless(httpx.AsyncByteStream):
    """A feed that never ends."""

    def __init__(self) -> None:
        self.is_closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"data: 1\n\n"
        await asyncio.Event().wait()

    async def aclose(self) -> None:
        self.is_closed = True


def test_a_feed_of_the_decodes_comes_piece_by_piece_and_ends_with_its_caller() -> None:
    feed, caller = Endless(), Caller("/events")

    async def run() -> None:
        transport = httpx.MockTransport(lambda request: httpx.Response(200, stream=feed))
        async with httpx.AsyncClient(transport=transport) as client:
            router = make_router(Pair("http://p", "http://d", "127.0.0.1", 8998, client))
            await asyncio.wait_for(router(caller.scope, caller.receive, caller.send), 5)

    asyncio.run(run())
    assert caller.pieces == [b"data: 1\n\n"] and feed.is_closed


class Torn(httpx.AsyncByteStream):
    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"data: 1\n\n"
        raise httpx.ReadError("gone")


def test_a_side_that_dies_in_the_middle_is_one_line_of_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    async def run() -> httpx.Response:
        transport = httpx.MockTransport(lambda request: httpx.Response(200, stream=Torn()))
        async with httpx.AsyncClient(transport=transport) as client:
            router = make_router(Pair("http://p", "http://d", "127.0.0.1", 8998, client))
            caller = httpx.ASGITransport(router, raise_app_exceptions=True)
            async with httpx.AsyncClient(transport=caller, base_url="http://r") as http:
                return await http.post("/generate", json={})

    with pytest.raises(AssertionError):  # httpx's transport: the response has no end
        asyncio.run(run())
    assert capsys.readouterr().err == "torchrun.sh: the decode's side ended in the middle of an answer: gone\n"


def test_a_put_generates_as_a_post_does() -> None:
    prefill, decode = Side(answer("first")), Side(answer("all"), delay_s=0.01)
    assert ask(prefill, decode, "PUT", json={}).json() == {"text": "all"}
    assert prefill.asked == decode.asked != []
    assert ask(prefill, decode, "DELETE").status_code == 405


def test_a_side_that_is_not_there_is_named() -> None:
    async def run() -> httpx.Response:
        router = make_router(Pair("http://127.0.0.1:9", "http://127.0.0.1:9", "127.0.0.1", 8998))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(router), base_url="http://r") as caller:
            return await caller.post("/generate", json={})

    reply = asyncio.run(run())
    error = reply.json()["error"]
    assert reply.status_code == 503 and "side cannot be reached" in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_a_wrong_address_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--prefill", "p:1", "--decode", "http://d"]) == 2
    assert "--prefill p:1: must be http://HOST:PORT" in capsys.readouterr().err
