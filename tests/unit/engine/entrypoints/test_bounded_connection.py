"""Connections end: whatever a client leaves out, and however it breaks the protocol."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.responses import Response
from support.http_service import HttpService, read_to_end, served, statuses, wait_until

from waybill.engine.entrypoints.api_keys import ApiKeys
from waybill.engine.entrypoints.errors import install_error_handlers
from waybill.engine.entrypoints.http_limits import HttpLimits
from waybill.engine.entrypoints.request_guard import RequestGuard

HOST = b"Host: h\r\n"
SHORT = 0.2
KEY = b"Authorization: Bearer k\r\n"
LIMITS = {
    "header_timeout_s": SHORT,
    "body_timeout_s": SHORT,
    "keep_alive_timeout_s": SHORT,
    "max_body_bytes": 1 << 20,
    "max_inflight_body_bytes": 2 << 20,
}


def application(limits: HttpLimits, *, keys: tuple[str, ...] = ()) -> FastAPI:
    app = FastAPI(redirect_slashes=False)
    install_error_handlers(app)
    app.add_middleware(RequestGuard, api_keys=ApiKeys(keys), limits=limits, not_ready=lambda: None)
    app.state.num_calls = 0

    @app.post("/size")
    async def size(http: Request) -> Response:
        app.state.num_calls += 1
        return Response(str(len(await http.body())))

    @app.get("/health")
    async def health() -> Response:
        return Response("well")

    @app.get("/large")
    async def large() -> Response:
        return Response(b"x" * (32 << 20))

    @app.get("/fault")
    async def fault() -> Response:
        raise RuntimeError("secret detail")

    return app


@pytest.fixture(scope="module")
def service() -> Iterator[HttpService]:
    """Short bounds, no key."""
    with served(application(HttpLimits(**LIMITS)), **LIMITS) as service:
        yield service


@pytest.fixture(scope="module")
def patient() -> Iterator[HttpService]:
    """A key, and bounds on time that no test reaches."""
    limits = {"max_body_bytes": 1 << 20, "max_inflight_body_bytes": 1 << 20}
    with served(application(HttpLimits(**limits), keys=("k",)), **limits) as service:
        yield service


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", []),
        (b"GET /health HTT", [408]),
        (b"GET /health HTTP/1.1\r\n" + HOST + b"X-Never", [408]),
        (b"POST /size HTTP/1.1\r\n" + HOST + b"Content-Length: 10\r\n\r\nabc", [408]),
        (b"POST /size HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab", [408]),
        (b"POST /size HTTP/1.1\r\n" + HOST + b"Content-Length: 10\r\nExpect: 100-continue\r\n\r\n", [408]),
        (b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n", [200]),
        (b"GET /health HTTP/1.1\r\n" + HOST + b"\r\nGET /health HT", [200]),
    ],
    ids=["nothing", "half a line", "half a head", "half a body", "half a chunk", "no body", "idle", "half of the next"],
)
def test_a_connection_that_waits_for_its_client_ends(service: HttpService, data: bytes, expected: list[int]) -> None:
    assert statuses(service.ask(data)) == expected
    wait_until(lambda: service.num_open == 0, "the connection is gone")


@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"POST"])
@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n"], ids=["first", "second"])
@pytest.mark.parametrize("size", [20_000, 60_000])
def test_a_head_in_one_piece_has_the_bound_of_one_in_many(
    service: HttpService, method: bytes, before: bytes, size: int
) -> None:
    head = method + b" /health HTTP/1.1\r\n" + HOST + b"X: " + b"x" * size + b"\r\n\r\n"
    answer = service.ask(before + head)
    assert statuses(answer) == [200] * bool(before) + [400]
    assert method == b"HEAD" or b"--max-header-bytes" in answer


def test_a_head_that_trickles_ends_in_time(service: HttpService) -> None:
    with service.connect() as client:
        received: list[bytes] = []
        reading = threading.Thread(target=lambda: received.append(read_to_end(client)))
        reading.start()
        for piece in [b"GET /health HTTP/1.1\r\n", *[b"X-A: b\r\n"] * 1000]:
            try:
                client.sendall(piece)
            except OSError:
                break
            if not reading.is_alive():
                break
            time.sleep(SHORT / 10)
        else:
            pytest.fail("the connection stayed open")
        reading.join(20)
    assert statuses(received[0]) in ([408], [])


def test_the_rest_of_a_body_is_read_and_then_the_connection_serves_again(patient: HttpService) -> None:
    """A refusal says so before the body is there; what comes of it is no request."""
    body = b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n"
    head = b"POST /size HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % len(body)
    with patient.connect(head) as client:
        assert statuses(client.recv(1 << 16)) == [401]
        client.sendall(body + b"GET /health HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n")
        assert statuses(read_to_end(client)) == [200]
    assert patient.app.state.num_calls == 0


def test_the_rest_of_a_body_that_never_comes_ends(patient: HttpService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("waybill.engine.entrypoints.bounded_connection.REST_TIMEOUT_S", SHORT)
    answer = patient.ask(b"POST /size HTTP/1.1\r\n" + HOST + b"Content-Length: 1000000000000\r\n\r\nabc")
    assert statuses(answer) == [401]


SMUGGLED = b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n"


@pytest.mark.parametrize("key", [b"", KEY], ids=["refused", "let in"])
@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
        b"Content-Length: 5, 6\r\n\r\nabcde",
        b"Content-Length: +5\r\n\r\nabcde",
        b"Content-Length: 0x5\r\n\r\nabcde",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n-1\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcdef\r\n0\r\n\r\n",
        b"Content-Length : 5\r\n\r\nabcde",
    ],
)
def test_broken_framing_has_one_answer(patient: HttpService, framing: bytes, key: bytes) -> None:
    answers = patient.ask(b"POST /size HTTP/1.1\r\n" + HOST + key + framing + SMUGGLED)
    assert len(statuses(answers)) == 1 and statuses(answers)[0] in (400, 401), answers
    wait_until(lambda: patient.num_open == 0, "the connection is gone")


def test_broken_chunks_behind_a_refusal_end_the_connection(patient: HttpService) -> None:
    with patient.connect(b"POST /size HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n") as client:
        assert statuses(client.recv(1 << 16)) == [401]
        client.sendall(b"zz\r\n" + SMUGGLED)
        assert statuses(read_to_end(client)) == []


def test_broken_chunks_behind_a_running_request_have_one_answer(patient: HttpService) -> None:
    head = b"POST /size HTTP/1.1\r\n" + HOST + KEY + b"Transfer-Encoding: chunked\r\n\r\n"
    with patient.connect(head + b"3\r\nabc\r\n") as client:
        wait_until(lambda: patient.num_open == 1, "the request runs")
        client.sendall(b"zz\r\n" + SMUGGLED)
        answers = read_to_end(client)
    assert statuses(answers) == [400] and b'"BadRequestError"' in answers


def test_who_waits_for_leave_to_send_a_body_and_is_refused_sends_none(patient: HttpService) -> None:
    answer = patient.ask(
        b"POST /size HTTP/1.1\r\n" + HOST + b"Content-Length: 9\r\nExpect: 100-continue\r\n\r\n" + SMUGGLED
    )
    assert statuses(answer) == [401] and b"100 Continue" not in answer


def test_a_refused_upload_can_read_why(patient: HttpService) -> None:
    """Also where it still sends: the bytes are taken, and dropped."""
    reply = httpx.post(f"{patient.url}/size", content=b"x" * (8 << 20), headers={"Authorization": "Bearer k"})
    assert reply.status_code == 413 and "--max-body-bytes" in reply.json()["error"]["message"]


def test_bodies_that_never_end_hold_no_more_than_the_bound() -> None:
    """Of 40 of them those that do not fit are told so; when their time is over there is room again."""
    limits = {**LIMITS, "body_timeout_s": 3.0}
    app = application(HttpLimits(**limits))
    with served(app, **limits) as service:
        budget = app.middleware_stack and gate_of(app)._budget
        head = b"POST /size HTTP/1.1\r\n" + HOST + b"Content-Length: 1000000\r\n\r\n"
        clients = [service.connect(head + b"x" * 500_000) for _ in range(40)]
        answers: list[bytes] = []
        threads = [
            threading.Thread(target=lambda client=client: answers.append(read_to_end(client))) for client in clients
        ]
        for thread in threads:
            thread.start()
        most = 0
        while any(thread.is_alive() for thread in threads):
            budget = gate_of(app)._budget
            most = max(most, budget.held_bytes)
            time.sleep(0.01)
        for client in clients:
            client.close()
        codes = sorted(code for answer in answers for code in statuses(answer))
        assert set(codes) == {408, 503} and len(codes) == 40, codes
        assert codes.count(408) <= 4
        assert 1 << 20 < most <= 2 << 20
        assert httpx.post(f"{service.url}/size", content=b"x" * 900_000).text == "900000"
        wait_until(lambda: gate_of(app)._budget.held_bytes == 0, "all is given back")


def gate_of(app: FastAPI) -> RequestGuard:
    layer = app.middleware_stack
    while not isinstance(layer, RequestGuard):
        layer = layer.app  # type: ignore[union-attr]
    return layer


def test_a_client_that_does_not_read_is_left() -> None:
    limits = {"write_timeout_s": SHORT, "keep_alive_timeout_s": SHORT}
    with served(application(HttpLimits(**limits)), **limits) as service:
        client = service.connect(b"GET /large HTTP/1.1\r\n" + HOST + b"\r\n")
        wait_until(lambda: service.num_open == 1, "it is served")
        wait_until(lambda: service.num_open == 0, "it is left")
        client.close()


def test_connections_beyond_the_bound_are_told_so_and_health_is_answered() -> None:
    with served(application(HttpLimits()), max_connections=3) as service:
        idle = [service.connect() for _ in range(3)]
        wait_until(lambda: service.num_open == 3, "they are open")
        reply = httpx.post(f"{service.url}/size", content=b"abc")
        assert reply.status_code == 503 and "Retry-After" in reply.headers
        assert "--max-connections" in reply.json()["error"]["message"]
        assert httpx.get(f"{service.url}/health").text == "well"
        # An upload is read to its end, so that the answer arrives.
        assert httpx.post(f"{service.url}/size", content=b"x" * (8 << 20)).status_code == 503
        wait_until(lambda: service.num_open == 3, "none of these stays")
        idle.pop().close()
        wait_until(lambda: service.num_open <= 2, "one is gone")
        assert httpx.post(f"{service.url}/size", content=b"abc").text == "3"
        for client in idle:
            client.close()


def test_a_fault_of_a_handler_is_json_and_ends_the_connection(
    patient: HttpService, caplog: pytest.LogCaptureFixture
) -> None:
    answer = patient.ask(b"GET /fault HTTP/1.1\r\n" + HOST + KEY + b"\r\n")
    assert statuses(answer) == [500] and b'"InternalServerError"' in answer and b"secret detail" not in answer
    assert any(record.exc_info for record in caplog.records)
    (said,) = [record for record in caplog.records if "a fault of the server" in record.message]
    assert said.fields == {"method": "GET", "path": "/fault", "rid": None}


SCARCE = """
import asyncio, logging, resource, socket, sys
from waybill.engine.entrypoints.bounded_server import BoundedServer
from waybill.engine.entrypoints.http_limits import HttpLimits
from waybill.engine.entrypoints.json_log import log_json_lines

async def app(scope, receive, send):
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})

log_json_lines("info")
listener = socket.create_server(("127.0.0.1", 0), backlog=512)
server = BoundedServer(app, listener, HttpLimits(), max_connections=10_000, shutdown_timeout_s=1)
resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))
print(listener.getsockname()[1], flush=True)
asyncio.run(server.serve())
"""


def test_without_file_descriptors_the_log_does_not_fill() -> None:
    """The bound on connections forbids it; here it is set beyond what there is."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCARCE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    port = int(process.stdout.readline())
    clients = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(100)]
    time.sleep(2)
    for client in clients:
        client.close()
    reply = httpx.get(f"http://127.0.0.1:{port}/", timeout=20)
    process.terminate()
    _, errors = process.communicate(timeout=20)
    assert reply.status_code == 200
    lines = [line for line in errors.splitlines() if "no connection can be taken" in line]
    assert 1 <= len(lines) <= 10, errors[-2000:]
    assert len(errors.splitlines()) <= 20


def test_what_the_listening_socket_cannot_do_any_more_ends_the_server() -> None:
    async def run() -> None:
        from waybill.engine.entrypoints.bounded_server import BoundedServer  # noqa: PLC0415

        listener = socket.create_server(("127.0.0.1", 0))
        server = BoundedServer(
            application(HttpLimits()), listener, HttpLimits(), max_connections=1, shutdown_timeout_s=1
        )
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        listener.shutdown(socket.SHUT_RDWR)
        with pytest.raises(OSError, match="Invalid argument"):
            await asyncio.wait_for(serving, 20)
        listener.close()

    asyncio.run(run())
