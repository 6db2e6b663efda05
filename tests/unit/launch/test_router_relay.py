"""Answers piece by piece: who leaves, who dies, and who refuses late."""

from __future__ import annotations

import asyncio
import logging

import httpx
import pytest
from support.router_servers import Caller, Feed

from waybill.launch.router_app import make_router
from waybill.launch.router_relay import begin
from waybill.launch.router_sides import DECODE, PREFILL, Side, Sides


def whole(content: bytes, status: int = 200) -> httpx.Response:
    return httpx.Response(status, stream=httpx.ByteStream(content))


def relay(caller: Caller, prefill: httpx.Response, decode: httpx.Response, delay_s: float = 0.0) -> tuple[Side, Side]:
    """What a router before two such servers does for the caller; `delay_s` is the prefill's."""
    sides = Side(PREFILL, "http://p", ("127.0.0.1", 8998)), Side(DECODE, "http://d")

    async def answer(request: httpx.Request) -> httpx.Response:
        if request.url.host == "d":
            return decode
        await asyncio.sleep(delay_s)
        return prefill

    async def run() -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
            router = make_router(Sides([sides[0]], [sides[1]], client))
            await asyncio.wait_for(router(caller.scope, caller.receive, caller.send), 5)

    asyncio.run(run())
    return sides


def test_a_feed_of_the_decodes_comes_piece_by_piece_and_ends_with_its_caller() -> None:
    feed, caller = Feed(b"data: 1\n\n"), Caller("/events")
    relay(caller, whole(b""), httpx.Response(200, stream=feed))
    assert caller.pieces == [b"data: 1\n\n"] and feed.is_closed


def test_a_caller_who_leaves_ends_both_answers() -> None:
    feeds, caller = [Feed(), Feed(b"data: 1\n\n")], Caller("/generate", "POST", b"{}")
    sides = relay(caller, *(httpx.Response(200, stream=feed) for feed in feeds))
    assert caller.pieces == [b"data: 1\n\n"] and all(feed.is_closed for feed in feeds)
    assert [side.num_running for side in sides] == [0, 0]


def test_a_side_that_dies_in_the_middle_is_one_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    feed, caller = Feed(b"data: 1\n\n", error=httpx.ReadError("gone")), Caller("/generate", "POST", b"{}")
    with caplog.at_level(logging.WARNING):
        relay(caller, whole(b""), httpx.Response(200, stream=feed))
    assert caplog.messages == ["the decode's side http://d ended in the middle of an answer: gone"]


def test_a_late_refusal_of_the_prefills_ends_a_stream_that_has_nothing_yet() -> None:
    """A decode's side begins a stream before it knows whether there will be a prompt."""
    feed, caller = Feed(), Caller("/generate", "POST", b'{"stream": true}')
    relay(caller, whole(b"full", 503), httpx.Response(200, stream=feed), delay_s=0.05)
    assert caller.pieces == [b"full"] and feed.is_closed


def test_who_dies_before_its_answer_is_named_and_not_asked_again() -> None:
    """What it has done is not known."""
    caller, asked = Caller("/generate", "POST", b"{}"), []

    async def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.host)
        if request.url.host == "p":
            await asyncio.sleep(5)
        raise httpx.ReadError("")

    async def run() -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
            decodes = [Side(DECODE, "http://d"), Side(DECODE, "http://e")]
            router = make_router(Sides([Side(PREFILL, "http://p", ("127.0.0.1", 8998))], decodes, client))
            await asyncio.wait_for(router(caller.scope, caller.receive, caller.send), 5)

    asyncio.run(run())
    assert (
        sorted(asked) == ["d", "p"] and b"the decode's side http://d cannot be reached: ReadError" in caller.pieces[0]
    )


def test_of_a_prefills_good_answer_nothing_is_kept() -> None:
    """However long it is."""
    pieces = [b"x" * 1000 for _ in range(3)]
    sides = Side(PREFILL, "http://p", ("127.0.0.1", 8998)), Side(DECODE, "http://d")
    begun = []

    async def run() -> None:
        transport = httpx.MockTransport(lambda request: httpx.Response(200, stream=Feed(*pieces, is_endless=False)))
        async with httpx.AsyncClient(transport=transport) as client:
            for side in sides:
                begun.append(await begin(client, side, httpx.Request("POST", side.url)))

    asyncio.run(run())
    assert [one.first for one in begun] == pieces[:1] * 2


def test_a_caller_who_leaves_before_its_body_is_whole_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    class Leaving(Caller):
        async def receive(self) -> dict[str, object]:
            return {"type": "http.disconnect"}

    for path, method in (("/generate", "POST"), ("/abort_request", "POST"), ("/server_info", "GET")):
        relay(Leaving(path, method), whole(b""), whole(b""))
    assert not caplog.records
