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
        sorted(asked) == ["d", "p"]
        and b"the decode's side http://d has ended before its answer: ReadError" in caller.pieces[0]
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


class Slow(Feed):
    """Whose connection closes in some turns of the loop."""

    async def aclose(self) -> None:
        await asyncio.sleep(0.02)
        await super().aclose()


@pytest.mark.parametrize("has_begun", [False, True])
def test_what_the_other_side_still_does_ends_with_a_refusal(has_begun: bool) -> None:
    """A server says that its caller is gone as soon as the answer is complete: while connections are being closed."""
    feed, was_closed, is_complete = Slow(), asyncio.Event(), asyncio.Event()

    async def answer(request: httpx.Request) -> httpx.Response:
        if request.url.host == "p":
            await asyncio.sleep(0.05)
            return whole(b"no", 503)
        if has_begun:
            return httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=feed)
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.02)
            was_closed.set()
        raise AssertionError

    caller, body = Caller("/generate", "POST"), [{"type": "http.request", "body": b"{}", "more_body": False}]

    async def receive() -> dict[str, object]:
        if body:
            return body.pop()
        await is_complete.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, object]) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body"):
            is_complete.set()

    async def run() -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
            router = make_router(
                Sides([Side(PREFILL, "http://p", ("127.0.0.1", 8998))], [Side(DECODE, "http://d")], client)
            )
            await asyncio.wait_for(router(caller.scope, receive, send), 5)
            assert feed.is_closed if has_begun else was_closed.is_set()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("first", "is_refusal"),
    [
        (b'data: {"text": "", "meta_info": {"finish_reason": {"type": "abort", "status_code": 400}}}\n\n', True),
        (b'data: {"error": {"message": "no --encoder", "code": 400}}\n\n', True),
        (b'data: {"text": "a", "meta_info": {"finish_reason": null}}\n\n', False),
        (b'data: {"choices": []}\n\n', False),
        (b"data: [DONE]\n\n", False),
    ],
)
def test_a_stream_in_which_the_prefills_side_refuses(first: bytes, is_refusal: bool) -> None:
    """The decode's side would wait for the prompt."""
    event_stream = {"content-type": "text/event-stream"}
    prefill = httpx.Response(200, headers=event_stream, stream=httpx.ByteStream(first))
    feed = Feed() if is_refusal else Feed(b"data: 1\n\n")
    caller = Caller("/generate", "POST", b"{}")
    relay(caller, prefill, httpx.Response(200, headers=event_stream, stream=feed))
    assert caller.pieces == [first if is_refusal else b"data: 1\n\n"] and feed.is_closed
