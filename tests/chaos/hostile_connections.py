"""Connections that no HTTP client would hold: half a request, half a body, nothing, noise; and too many of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import resource
import socket
import struct
import time

from .scene import Scene

HOLD_S = (0.3, 1.5)
# Descriptors that a server under a storm has beyond those that it holds.
SPARE_DESCRIPTORS = 24
NUM_STORMING = 150
MAX_LOG_LINES = 200
BODY = b'{"text": "a", "sampling_params": {"max_new_tokens": 1}}'


def requests(choose: random.Random) -> dict[str, bytes]:
    """Beginnings and malformed wholes."""
    head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return {
        "nothing": b"",
        "half a line": b"POST /gen",
        "half the headers": head,
        "no body": head + b"Content-Length: 25000000\r\n\r\n",
        "half a body": head + b"Content-Length: 25000000\r\n\r\n" + b" " * 2_000_000,
        "half a chunk": head + b"Transfer-Encoding: chunked\r\n\r\nfffff\r\n" + b" " * 5000,
        "a wrong chunk": head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        "endless chunks": head + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 20_000,
        "a negative length": head + b"Content-Length: -1\r\n\r\n" + BODY,
        "two lengths": head + b"Content-Length: 1\r\nContent-Length: 55\r\n\r\n" + BODY,
        "length and chunks": head
        + b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" % len(BODY)
        + b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "a long header": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 200_000,
        "many headers": b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 5000,
        "noise": choose.randbytes(3000),
        "a TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + choose.randbytes(200),
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + choose.randbytes(30),
        "a pipeline": b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50,
        "an upgrade": b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        "zero bytes": b"\0" * 10_000,
    }


async def unfinished_requests(scene: Scene) -> str:
    """Many of them at once, held for a while, then dropped in different ways."""
    choose = scene.choose
    kinds = requests(choose)
    names = [choose.choice(list(kinds)) for _ in range(choose.randint(5, 25))]
    hold = choose.uniform(*HOLD_S)
    ends = [choose.choice(("close", "reset", "half close")) for _ in names]
    await asyncio.gather(
        *(hold_connection(scene, name, kinds[name], hold, end) for name, end in zip(names, ends, strict=True))
    )
    return f"{len(names)} connections ({', '.join(sorted(set(names)))}) for {hold:.1f} s"


async def hold_connection(scene: Scene, name: str, data: bytes, hold_s: float, end: str) -> None:
    reader, writer = await asyncio.open_connection(*scene.server.address)
    try:
        writer.write(data)
        # A server need not read what it does not want.
        with contextlib.suppress(TimeoutError, ConnectionError):
            await asyncio.wait_for(writer.drain(), hold_s)
        await asyncio.sleep(hold_s)
        if end == "half close" and writer.can_write_eof():
            writer.write_eof()
        elif end == "reset":
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            return
        answered = await read_what_is_there(reader)
        if answered and not answered.startswith(b"HTTP/1.1 "):
            scene.faults.append(f"{name}: answered {answered[:80]!r}")
        if name == "length and chunks" and answered.count(b"HTTP/1.1 ") > 1:
            scene.faults.append(f"{name}: {answered.count(b'HTTP/1.1 ')} responses to one request")
    except OSError:
        # A server may cut off what is no request, and then there is no socket any more.
        pass
    finally:
        writer.close()


async def read_what_is_there(reader: asyncio.StreamReader) -> bytes:
    found = b""
    try:
        while part := await asyncio.wait_for(reader.read(1 << 16), 0.2):
            found += part
    except TimeoutError:
        pass
    return found


async def connection_storm(scene: Scene) -> str:
    """More connections than the server may open: who is connected goes on, and the log does not fill up."""
    server = scene.server
    frontend = server.place.process("frontend")
    lines_before = server.num_log_lines - scene.witness.num_asked
    before = frontend.rlimit(resource.RLIMIT_NOFILE)
    limit = frontend.num_fds() + SPARE_DESCRIPTORS
    frontend.rlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    hold = scene.choose.uniform(*HOLD_S)
    sockets = []
    try:
        for _ in range(NUM_STORMING):
            each = socket.socket()
            each.setblocking(False)
            each.connect_ex(server.address)
            sockets.append(each)
        await asyncio.sleep(hold)
    finally:
        for each in sockets:
            each.close()
        frontend.rlimit(resource.RLIMIT_NOFILE, before)
    num_lines = server.num_log_lines - scene.witness.num_asked - lines_before
    if num_lines > MAX_LOG_LINES:
        scene.faults.append(f"{num_lines} log lines in {hold:.1f} s of a storm")
    await new_connection_is_served(scene)
    return f"{NUM_STORMING} connections for {hold:.1f} s, {SPARE_DESCRIPTORS} descriptors"


async def new_connection_is_served(scene: Scene, within_s: float = 5.0) -> None:
    deadline = time.monotonic() + within_s
    try:
        reader, writer = await asyncio.wait_for(asyncio.open_connection(*scene.server.address), within_s)
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answered = await asyncio.wait_for(reader.read(), max(0.1, deadline - time.monotonic()))
        writer.close()
    except (TimeoutError, ConnectionError) as error:
        scene.faults.append(f"a new connection was not served within {within_s:.0f} s: {error!r}")
        return
    if not answered.startswith(b"HTTP/1.1 200"):
        scene.faults.append(f"a new connection was answered {answered[:80]!r}")


async def unread_streams(scene: Scene) -> str:
    """Streams of several samples that nobody reads, over a small window, and that end by a reset."""
    choose = scene.choose
    number, samples = choose.randint(2, 6), choose.choice((1, 4))
    body = json.dumps(
        {
            "text": "a",
            "stream": True,
            "return_routed_experts": scene.service.shape.routing,
            "sampling_params": {"max_new_tokens": 600, "ignore_eos": True, "n": samples},
        }
    ).encode()
    head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    sockets = []
    for _ in range(number):
        each = socket.socket()
        each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        each.connect(scene.server.address)
        each.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        sockets.append(each)
    hold = choose.uniform(*HOLD_S)
    await asyncio.sleep(hold)
    for each in sockets:
        each.close()
    return f"{number} streams of {samples} samples, unread for {hold:.1f} s"
