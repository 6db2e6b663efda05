"""ZMQ endpoints typed by message.

Every socket carries exactly one msgspec type (or tagged union), encoded as msgpack; bulk bytes follow as frames of
their own and are not copied into the message. Addresses are IPC or loopback unless the operator says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import msgspec
import zmq
import zmq.asyncio

T = TypeVar("T")


def _open(context: zmq.Context[Any], kind: int, address: str, *, bind: bool) -> zmq.Socket[Any]:
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    # Bounds stand where the sender decides (ring slots, admission); a high-water mark here would drop or block silently.
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    if bind:
        socket.bind(address)
    else:
        socket.connect(address)
    return socket


class Sender(Generic[T]):
    """The sending end of a PUSH/PULL pipe of `T`."""

    def __init__(self, context: zmq.Context[Any], address: str, *, bind: bool = False) -> None:
        self._socket = _open(context, zmq.PUSH, address, bind=bind)
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, message: T, frames: Sequence[bytes | memoryview] = ()) -> None:
        """Queue a message and the frames that belong to it. Never blocks."""
        self._socket.send_multipart([self._encoder.encode(message), *frames], copy=not frames)

    def flush_and_close(self, timeout_s: float) -> None:
        """Close; wait up to `timeout_s` for what is queued to reach the peer."""
        self._socket.close(linger=int(timeout_s * 1000))


class Receiver(Generic[T]):
    """The receiving end of a PUSH/PULL pipe of `T`."""

    def __init__(self, context: zmq.Context[Any], address: str, message_type: Any, *, bind: bool = True) -> None:
        self._socket = _open(context, zmq.PULL, address, bind=bind)
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(message_type)

    def wait(self, timeout_s: float) -> bool:
        """Whether a message is there; sleeps up to `timeout_s` for one."""
        return bool(self._socket.poll(int(timeout_s * 1000)))

    def receive_nowait(self) -> T | None:
        """The next message without its frames, or None."""
        try:
            parts = self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None
        return self._decoder.decode(parts[0])

    def receive(self) -> tuple[T, list[memoryview]]:
        """Wait for a message; return it with its frames."""
        head, *frames = self._socket.recv_multipart(copy=False)
        return self._decoder.decode(head.buffer), [frame.buffer for frame in frames]

    def close(self) -> None:
        self._socket.close(linger=0)


class AsyncReceiver(Generic[T]):
    """`Receiver` for an asyncio event loop."""

    def __init__(self, context: zmq.asyncio.Context, address: str, message_type: Any, *, bind: bool = True) -> None:
        self._socket: Any = _open(context, zmq.PULL, address, bind=bind)
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(message_type)

    async def receive(self) -> tuple[T, list[memoryview]]:
        """Await a message; return it with its frames."""
        head, *frames = await self._socket.recv_multipart(copy=False)
        return self._decoder.decode(head.buffer), [frame.buffer for frame in frames]

    def close(self) -> None:
        self._socket.close(linger=0)
