"""The endpoint that any program of this user may talk to: what it sends is answered or dropped, and the thread lives."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq

from waybill.engine.ipc.output_queries import ClaimReply, CountersReply, FetchClaimReq, GetCountersReq, OutputReply
from waybill.engine.output.expert_load import ExpertLoad
from waybill.engine.output.query_server import MAX_QUERY_BYTES, QueryServer
from waybill.engine.routing.claims import ClaimStore
from waybill.engine.routing.geometry import RouteGeometry
from waybill.engine.routing.wire import decode, encode

GEOMETRY = RouteGeometry(layer_ids=(0,), num_layers_total=1, max_tokens=8, top_k=2, num_experts=16)
NUM_ROWS = 1 << 17
ROW_BYTES = 2
WAIT_MS = 20_000


class Service:
    """A server on a thread, and programs that talk to it."""

    def __init__(self, folder: Path, max_unread_bytes: int) -> None:
        self.context = zmq.Context()
        self.address = f"ipc://{folder}/queries"
        claims = ClaimStore(1 << 30, 1000.0, lambda: 0.0)
        self.claim = claims.put(encode(np.zeros((NUM_ROWS, 1, 2), np.uint8), 0, GEOMETRY, [("v", 0, NUM_ROWS)]))
        self.server = QueryServer(
            self.context, self.address, claims, lambda: {"slices": 7}, ExpertLoad(), max_unread_bytes
        )
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()
        self.sockets: list[zmq.Socket[bytes]] = []

    def _serve(self) -> None:
        try:
            self.server.serve()
        except zmq.ContextTerminated:
            self.server._socket.close()
        except BaseException as error:
            self.failure = error

    def connect(self, kind: int, **options: int) -> zmq.Socket[bytes]:
        socket = self.context.socket(kind)
        socket.linger = 0
        socket.rcvtimeo = WAIT_MS
        for name, value in options.items():
            socket.setsockopt(getattr(zmq, name), value)
        socket.connect(self.address)
        self.sockets.append(socket)
        return socket

    def check_it_lives(self) -> None:
        socket = self.connect(zmq.REQ)
        deadline = time.monotonic() + WAIT_MS / 1000
        frames: list[bytes] = []
        while len(frames) != 2:
            # That others have read theirs becomes known a moment later.
            assert time.monotonic() < deadline, frames
            socket.send(msgspec.msgpack.encode(FetchClaimReq("op", self.claim)))
            frames = socket.recv_multipart()
        reply = reply_of(frames[0])
        assert isinstance(reply, ClaimReply) and reply.op_id == "op" and reply.meta is not None
        assert len(decode(reply.meta, frames[1]).rows) == NUM_ROWS
        assert self.failure is None


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    services: list[Service] = []

    def make(max_unread_bytes: int = 1 << 30) -> Service:
        services.append(Service(tmp_path, max_unread_bytes))
        return services[-1]

    yield make
    for service in services:
        for socket in service.sockets:
            socket.close(linger=0)
        service.context.term()
        service.thread.join(20)


def reply_of(head: bytes) -> OutputReply:
    return msgspec.msgpack.decode(head, type=OutputReply)


MALFORMED = {
    "nothing": [b""],
    "text": [b"hello"],
    "an unknown tag": [msgspec.msgpack.encode({"type": "shutdown", "op_id": "x"})],
    "a missing field": [msgspec.msgpack.encode({"type": "fetch_claim", "op_id": "x"})],
    "a field of another type": [msgspec.msgpack.encode({"type": "fetch_claim", "op_id": 5, "claim": "c"})],
    "invalid UTF-8": [b"\x83\xa4type\xabfetch_claim\xa5op_id\xa1\xff\xa5claim\xa1c"],
    "cut off": [msgspec.msgpack.encode(FetchClaimReq("op", "claim"))[:-3]],
    "a deep nest": [b"\x81\xa1x" + b"\x91" * 4000 + b"\xc0"],
    "many frames": [b"a"] * 100,
    "a length that is not there": [b"\xdd\xff\xff\xff\xff"],
}


@pytest.mark.parametrize("kind", [zmq.DEALER, zmq.REQ], ids=["DEALER", "REQ"])
def test_what_is_no_question_is_answered_with_an_error(make: Callable[..., Service], kind: int) -> None:
    service = make()
    for name, frames in MALFORMED.items():
        socket = service.connect(kind)
        socket.send_multipart(frames)
        reply = reply_of(socket.recv_multipart()[0])
        assert isinstance(reply, ClaimReply) and reply.meta is None and reply.error, name
    assert service.server.num_malformed == len(MALFORMED)
    service.check_it_lives()


def test_a_dealer_and_a_req_are_answered_in_their_own_form(make: Callable[..., Service]) -> None:
    service = make()
    for kind in (zmq.REQ, zmq.DEALER):
        socket = service.connect(kind)
        socket.send(msgspec.msgpack.encode(GetCountersReq("op")))
        reply = reply_of(socket.recv())
        assert isinstance(reply, CountersReply) and reply.counters["slices"] == 7
        socket.send(msgspec.msgpack.encode(FetchClaimReq("op", "unknown")))
        reply = reply_of(socket.recv())
        assert isinstance(reply, ClaimReply) and "unknown" in str(reply.error)
    service.check_it_lives()


def test_a_question_of_any_length_holds_no_memory(make: Callable[..., Service]) -> None:
    service = make()
    for claim, op_id in (("c" * 10_000_000, "op"), ("c", "o" * 10_000_000), ("c" * MAX_QUERY_BYTES, "op")):
        socket = service.connect(zmq.DEALER)
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        socket.send(msgspec.msgpack.encode(FetchClaimReq(op_id, claim)))
        assert monitor.poll(WAIT_MS), "its connection is closed"
        socket.disable_monitor()
    service.check_it_lives()


def test_who_does_not_read_gets_no_more_rows_and_others_are_served(make: Callable[..., Service]) -> None:
    """Unread rows are bounded in bytes; an error says so, for whoever reads again later."""
    most = 20
    service = make(most * NUM_ROWS * ROW_BYTES)
    lazy = service.connect(zmq.DEALER, RCVHWM=1)
    question = msgspec.msgpack.encode(FetchClaimReq("op", service.claim))
    asked = 200
    for _ in range(asked):
        lazy.send(question)
    other = service.connect(zmq.DEALER)
    other.send(msgspec.msgpack.encode(GetCountersReq("op")))
    assert isinstance(reply_of(other.recv()), CountersReply)
    replies = [lazy.recv_multipart() for _ in range(asked)]
    refused = [frames for frames in replies if len(frames) == 1]
    assert refused and b"too many replies wait to be read" in refused[0][0]
    assert msgspec.msgpack.decode(refused[0][0], type=ClaimReply).is_busy
    service.check_it_lives()


def test_answers_to_those_who_have_left_are_dropped_and_counted(make: Callable[..., Service]) -> None:
    service = make()
    for _ in range(50):
        socket = service.connect(zmq.DEALER)
        for _ in range(20):
            socket.send(msgspec.msgpack.encode(FetchClaimReq("op", service.claim)))
        socket.close(linger=100)
        service.sockets.remove(socket)
    service.check_it_lives()
