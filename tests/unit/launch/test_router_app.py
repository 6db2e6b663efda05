"""The router before engines: what goes to whom, who is chosen, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from starlette.responses import StreamingResponse
from support.router_servers import Routed, Server, answer

from waybill.engine.entrypoints.api_keys import ApiKeys
from waybill.engine.entrypoints.http_limits import HttpLimits
from waybill.engine.entrypoints.origin_guard import AllowedHosts


def pair(**options: Any) -> tuple[Server, Server, Routed]:
    prefill, decode = Server(answer("first")), Server(answer("all"), delay_s=0.01)
    return prefill, decode, Routed([prefill], [decode], **options)


def test_both_are_asked_and_the_decode_answers() -> None:
    prefill, decode, router = pair()
    reply = router.ask(json={"text": "a", "stream": False, "bootstrap_room": 1})
    assert reply.status_code == 200 and reply.json() == {"text": "all"}
    (one,), (two,) = prefill.asked, decode.asked
    assert one == two and one["bootstrap_host"] == "10.0.0.1" and one["bootstrap_port"] == 9000
    assert 1 < one["bootstrap_room"] < 2**63 and one["text"] == "a"
    assert router.ask("PUT", json={}).json() == {"text": "all"}
    assert len(prefill.asked) == len(decode.asked) == 2


def test_values_are_passed_on_as_they_came() -> None:
    prefill, decode, router = pair()
    router.ask(content=b'{"a": 123456789012345678901234567890, "b": 1e400, "c": "\\u0000\\ud83d\\ude00", "d": [1.10]}')
    (body,) = decode.asked
    assert body["a"] == 123456789012345678901234567890 and body["b"] == float("inf") and body["c"] == "\0\U0001f600"
    assert prefill.asked == [body]


def test_a_stream_passes_through() -> None:
    decode = Server(StreamingResponse(iter(["data: 1\n\n", "data: [DONE]\n\n"]), media_type="text/event-stream"))
    reply = Routed([Server(answer("first"), delay_s=1.0)], [decode]).ask(json={"text": "a", "stream": True})
    assert reply.text == "data: 1\n\ndata: [DONE]\n\n" and reply.headers["content-type"].startswith("text/event-stream")


def test_the_refusal_of_either_side_is_the_answer() -> None:
    refusing, waiting = Server(answer("no", 400)), Server(answer("late"), delay_s=5.0)
    assert Routed([refusing], [waiting]).ask(json={}).json() == {"text": "no"}
    assert Routed([waiting], [refusing]).ask(json={}).status_code == 400
    reply = Routed([refusing], [waiting]).ask(content=b"[")
    assert reply.status_code == 400 and "must be a JSON object" in reply.json()["error"]["message"]


def test_requests_go_where_the_fewest_run_and_in_turn() -> None:
    prefills, decodes = [Server(answer("p")) for _ in range(2)], [Server(answer("d"), delay_s=0.01) for _ in range(2)]
    router = Routed(prefills, decodes)
    for _ in range(4):
        router.ask(json={})
    assert [len(one.asked) for one in (*prefills, *decodes)] == [2] * 4
    assert {body["bootstrap_port"] for one in decodes for body in one.asked} == {9000, 9001}
    for one, port in zip(prefills, (9000, 9001), strict=True):
        assert all(body["bootstrap_port"] == port for body in one.asked)
    router.decodes[0].num_running = 1
    for _ in range(3):
        router.ask(json={})
    assert [len(one.asked) for one in decodes] == [2, 5]


def test_a_session_stays_with_its_sides() -> None:
    decodes = [Server(answer("d"), delay_s=0.01) for _ in range(4)]
    for name in ("a", "b"):
        # Whichever router it comes through.
        for _ in range(3):
            Routed([Server(answer("p"))], decodes).ask(json={"session_id": name})
        Routed([Server(answer("p"))], decodes).ask(json={}, headers={"X-SMG-Routing-Key": name})
    counts = sorted(len(one.asked) for one in decodes)
    assert counts in ([0, 0, 4, 4], [0, 0, 0, 8])
    used = [one for one in decodes if one.asked]
    used[0].is_there = False
    assert Routed([Server(answer("p"))], decodes).ask(json={"session_id": "a"}).status_code == 200


def test_who_cannot_be_reached_is_left_out_and_the_request_goes_on() -> None:
    decodes = [Server(answer("d"), delay_s=0.01, is_there=False), Server(answer("d"), delay_s=0.01)]
    prefills = [Server(answer("p")), Server(answer("p"), is_there=False)]
    router = Routed(prefills, decodes)
    for _ in range(4):
        assert router.ask(json={}).status_code == 200
    rooms = [body["bootstrap_room"] for body in prefills[0].asked]
    assert len(set(rooms)) == len(rooms), "each attempt has a room of its own"
    assert [bool(side.problem) for side in (*router.prefills, *router.decodes)] == [False, True, True, False]
    assert all(side.num_running == 0 for side in (*router.prefills, *router.decodes))
    prefills[0].is_there = False
    reply = router.ask(json={})
    assert reply.status_code == 503 and "the prefill's side http://p" in reply.json()["error"]["message"]
    # Who is back is seen by a question for its health.
    decodes[0].is_there = prefills[1].is_there = True
    assert router.ask("GET", "/health").status_code == 200
    assert not router.decodes[0].problem and not router.prefills[1].problem and router.prefills[0].problem


def test_health_is_that_of_one_of_each_at_least() -> None:
    good, bad = Server(answer("good")), Server(answer("bad", 503))
    for path in ("/health", "/health/", "/ping", "/ready", "/health_generate"):
        for prefills, decodes, status in (
            ([good], [good], 200),
            ([bad], [good], 503),
            ([good], [bad], 503),
            ([bad, good], [good, bad], 200),
        ):
            router = Routed(prefills, decodes)
            reply = router.ask("GET", path)
            assert reply.status_code == router.ask("HEAD", path).status_code == status
    assert "the decode's side http://d0: /health answers 503" in Routed([good], [bad]).ask("GET", "/health").text


def test_a_server_of_the_other_kind_is_named() -> None:
    router = Routed([Server(answer(""), kind="decode")], [Server(answer(""), kind="decode")])
    message = router.ask("GET", "/health").json()["error"]["message"]
    assert message == "the prefill's side http://p0: is a server with --disaggregation decode"


def test_what_changes_nothing_is_asked_of_one_decode() -> None:
    decodes = [Server(answer("one")), Server(answer("two"))]
    router = Routed([Server(answer("p"))], decodes)
    for method, path in (("GET", "/server_info"), ("GET", "/v1/models"), ("HEAD", "/"), ("POST", "/tokenize")):
        assert router.ask(method, path, json={}).status_code == 200
    assert [len(one.requests) for one in decodes] == [4, 0]
    decodes[0].is_there = False
    router.ask("GET", "/health")
    assert router.ask("GET", "/server_info").json() == {"text": "two"}


def test_what_changes_an_engine_is_refused() -> None:
    prefill, decode, router = pair()
    for method, path in (("POST", "/pause_generation"), ("POST", "/update_weights_from_disk"), ("GET", "/flush_cache")):
        reply = router.ask(method, path, json={})
        assert reply.status_code == 404 and "at its own address" in reply.json()["error"]["message"]
    assert prefill.requests == decode.requests == []


def test_aborts_go_to_every_decode_and_claims_to_who_has_them() -> None:
    decodes = [Server(answer("gone", 410)), Server(answer("rows"))]
    router = Routed([Server(answer("p"))], decodes)
    reply = router.ask("GET", "/routed_experts/claim")
    assert reply.status_code == 200 and reply.json() == {"text": "rows"}
    assert Routed([Server(answer("p"))], decodes[:1]).ask("GET", "/routed_experts/claim").json() == {"text": "gone"}
    assert router.ask(path="/abort_request", json={"rid": "a"}).status_code == 410
    decodes[0].is_there = False
    assert router.ask(path="/abort_request", json={"rid": "a"}).status_code == 200
    assert [one.asked for one in decodes] == [[{"rid": "a"}], [{"rid": "a"}, {"rid": "a"}]]
    decodes[1].is_there = False
    assert router.ask(path="/abort_request", json={"rid": "a"}).status_code == 503


def test_paths_queries_and_headers_are_passed_on_and_what_is_for_one_hop_is_not() -> None:
    reply = answer("ok", headers={"Connection": "x-hop", "x-hop": "1", "x-end": "2", "Date": "then", "Server": "s"})
    reply.headers.append("x-twice", "1")
    reply.headers.append("x-twice", "2")
    decode = Server(reply)
    headers = [("Connection", "x-mine, TE"), ("x-mine", "1"), ("TE", "trailers"), ("x-end", "2"), ("Upgrade", "h2c")]
    got = Routed([Server(answer("p"))], [decode]).ask(
        "GET", "/v1/models/a%2Fb%3Fc?x=%20&x=2", headers=[*headers, ("x-many", "1"), ("x-many", "2"), ("cookie", "k=v")]
    )
    (request,) = decode.requests
    assert request.scope["raw_path"] == b"/v1/models/a%2Fb%3Fc" and request.url.query == "x=%20&x=2"
    assert request.headers["host"] == "d0" and request.headers["x-end"] == "2" and request.headers["cookie"] == "k=v"
    assert request.headers.getlist("x-many") == ["1", "2"]
    assert not {"x-mine", "te", "upgrade"} & set(request.headers.keys())
    assert got.headers["x-end"] == "2" and got.headers.get_list("x-twice") == ["1", "2"]
    assert not {"x-hop", "connection", "date", "server"} & set(got.headers.keys())


def test_one_caller_gets_nothing_of_anothers() -> None:
    """A cookie that something before the engines has set, say."""
    decode = Server(answer("d", headers={"Set-Cookie": "of=somebody"}))
    router = Routed([Server(answer("p"))], [decode])

    async def twice(caller: httpx.AsyncClient) -> None:
        for _ in range(2):
            caller.cookies.clear()
            await caller.get("/server_info", headers={"user-agent": "me"})

    router.run(twice)
    assert all("cookie" not in request.headers for request in decode.requests)


def test_keys_names_and_sizes() -> None:
    prefill, decode, router = pair(
        api_keys=ApiKeys(["secret"]), allowed_hosts=AllowedHosts("127.0.0.1"), limits=HttpLimits(max_body_bytes=1000)
    )
    key = {"Authorization": "Bearer secret", "host": "127.0.0.1"}
    assert router.ask(json={}, headers={"host": "localhost"}).status_code == 401
    assert router.ask(json={}, headers={"host": "rebound.example"}).status_code == 403
    assert router.ask("GET", "/health", headers={"host": "localhost"}).status_code == 200
    assert router.ask(json={}, headers=key).status_code == 200
    assert (
        decode.requests[0].headers["authorization"] == prefill.requests[0].headers["authorization"] == "Bearer secret"
    )
    reply = router.ask(json={"text": "a" * 1000}, headers=key)
    assert reply.status_code == 413 and "--max-body-bytes" in reply.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/generate", "/inference/v1/generate"])
def test_metrics_are_the_routers_own(path: str) -> None:
    decodes = [Server(answer("d"), delay_s=0.01), Server(answer("d"), is_there=False)]
    router = Routed([Server(answer("p"))], decodes)
    for _ in range(3):
        router.ask(path=path, json={})
    text = router.ask("GET", "/metrics").text
    assert 'waybill_router_up{side="decode",url="http://d0"} 1.0' in text
    assert 'waybill_router_up{side="decode",url="http://d1"} 0.0' in text
    assert 'waybill_router_requests_total{side="decode",url="http://d0"} 3.0' in text
    assert 'waybill_router_failures_total{side="decode",url="http://d1"} 1.0' in text
    assert 'waybill_router_running_requests{side="decode",url="http://d0"} 0.0' in text


def test_errors_have_the_engines_form() -> None:
    reply = Routed([Server(answer("p"), is_there=False)], [Server(answer("d"), is_there=False)]).ask(json={})
    error = json.loads(reply.content)["error"]
    assert reply.status_code == 503 and "side http://" in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_workers_are_listed_as_trainers_read_them() -> None:
    _, _, router = pair()
    answer = router.ask("GET", "/workers").json()
    assert [worker["url"] for worker in answer["workers"]] == router.ask("GET", "/list_workers").json()["urls"]
    assert answer["total"] == 2 and answer["workers"][0] == {
        **{"url": "http://p0", "worker_type": "prefill", "is_healthy": True, "load": 0, "bootstrap_port": 9000},
    }
    assert router.ask("POST", "/workers", json={"url": "http://x"}).status_code == 404
