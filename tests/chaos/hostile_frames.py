"""Messages that no process of ours sends, to the sockets of a run."""

from __future__ import annotations

import asyncio
import random
import socket
from pathlib import Path

import msgspec
import zmq

from waybill.engine.ipc.output_queries import FetchClaimReq, GetCountersReq

from .scene import Scene

encode = msgspec.msgpack.encode
KINDS = {"dealer": zmq.DEALER, "req": zmq.REQ, "push": zmq.PUSH, "router": zmq.ROUTER}
MIB = 1 << 20
SEND_TIMEOUT_MS = 200


def malformed(choose: random.Random) -> list[bytes]:
    """One message, of one frame or several."""
    deep = b"\x91" * 3000 + b"\xc0"
    wrong_types = {"type": choose.choice(("fetch_claim", "generate", "abort", "", 7)), "op_id": [1], "claim": {}}
    good = encode(FetchClaimReq("x", "0" * 32))
    messages = [
        [b""],
        [b"", b""],
        [b"\xc1"],
        [choose.randbytes(choose.randint(1, 300))],
        [encode(wrong_types)],
        [encode(choose.choice((None, True, 1, "x", [], [[]], {}, {"type": None})))],
        [deep],
        [good[: choose.randrange(len(good))]],
        [good, b"more"],
        [b"", good],
        [b""] * 20,
        [choose.randbytes(40)] * 200,
        [choose.randbytes(64) * (MIB // 8)],
        [encode({"type": "generate", "seq": -(2**63), "rid": "x", "input_ids": b"123", "sampling_params": {}})],
        [encode({"type": "abort", "seq": 2**63 - 1, "rid": "nobody"})],
    ]
    return choose.choice(messages)


def claim_messages(choose: random.Random) -> list[bytes]:
    """Malformed or not: well-formed questions about claims that there are not."""
    if choose.random() < 0.7:
        return malformed(choose)
    claim = choose.choice(("0" * 32, "", "x" * choose.choice((10, 100_000)), "0.", "é\0"))
    return [encode(choose.choice((FetchClaimReq(claim, claim), GetCountersReq(claim))))]


async def claim_frames(scene: Scene) -> str:
    """On the socket that is documented for fetching routes: by sockets of all kinds, some of which do not read."""
    address = (await scene.service.info()).get(
        "routed_experts_endpoint"
    ) or f"ipc://{scene.service.place.run_dir}/queries0"
    number = scene.choose.randint(10, 40)
    context = zmq.Context()
    try:
        # Not on the loop, on which the witness waits.
        kinds = await asyncio.to_thread(send_to_claims, context, address, number, scene.choose)
        await asyncio.sleep(0.5)
    finally:
        context.destroy(linger=0)
    return f"{number} sockets: {', '.join(sorted(set(kinds)))}"


def send_to_claims(
    context: zmq.Context[zmq.Socket[bytes]], address: str, number: int, choose: random.Random
) -> list[str]:
    """By so many sockets; returns their kinds, and what else was sent."""
    kinds = []
    for _ in range(number):
        kind = choose.choice(list(KINDS))
        kinds.append(kind)
        send(context, KINDS[kind], address, [claim_messages(choose) for _ in range(choose.randint(1, 5))])
    if choose.random() < 0.5:
        kinds.append("2,000 questions, answers unread")
        send(context, zmq.DEALER, address, [[encode(FetchClaimReq("1", "0" * 32))]] * 2000)
    if choose.random() < 0.5:
        kinds.append("noise before any greeting")
        send_raw(Path(address.removeprefix("ipc://")), choose.randbytes(2000))
    return kinds


def send(context: zmq.Context[zmq.Socket[bytes]], kind: int, address: str, messages: list[list[bytes]]) -> None:
    socket = context.socket(kind)
    socket.setsockopt(zmq.SNDTIMEO, SEND_TIMEOUT_MS)
    # What the other side does not take keeps nobody here.
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(address)
    try:
        for message in messages:
            socket.send_multipart(message)
    except zmq.ZMQError:
        # Not every kind of socket may send, or be understood, at any time.
        return


def send_raw(path: Path, data: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(str(path))
        raw.sendall(data)


def internal_sockets(run_dir: Path) -> list[str]:
    """The names of a run's sockets."""
    return sorted(path.name for path in run_dir.iterdir() if path.is_socket())


def send_to_internal(run_dir: Path, name: str, choose: random.Random) -> tuple[zmq.Context[zmq.Socket[bytes]], str]:
    """One malformed message to one socket. Returns its context, to be destroyed later, and what was sent."""
    context = zmq.Context()
    message = malformed(choose)
    kind = zmq.DEALER if name.startswith("queries") else zmq.PUSH
    send(context, kind, f"ipc://{run_dir}/{name}", [message])
    return context, f"{len(message)} frames, {sum(map(len, message))} bytes: {message[0][:24]!r}"
