"""ZMQ endpoints typed by message.

Every socket carries exactly one msgspec type (or tagged union), encoded as msgpack; bulk bytes follow as frames of
their own and are not copied into the message. On one node endpoints are IPC; between nodes they are TCP with CURVE, never
without (see `curve.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Generic, TypeVar

import msgspec
import zmq
import zmq.asyncio

T = TypeVar("T")

Z85_KEY = Annotated[bytes, msgspec.Meta(min_length=40, max_length=40)]
# All endpoints of a run are one domain of libzmq's authentication protocol.
ZAP_DOMAIN = "waybill"
NO_OPTIONS: Mapping[int, int] = MappingProxyType({})


class CurveKeys(msgspec.Struct, frozen=True):
    """The keys of one run, a pair for those who bind and one for those who connect. Who has them belongs to the run."""

    server_public: Z85_KEY
    server_secret: Z85_KEY
    client_public: Z85_KEY
    client_secret: Z85_KEY

    @staticmethod
    def make() -> CurveKeys:
        return CurveKeys(*zmq.curve_keypair(), *zmq.curve_keypair())


class Endpoint(msgspec.Struct, frozen=True):
    """Where a socket is: an IPC address, or a TCP one and the keys of the run.

    `fd` is a socket that listens there already, for the process that it was opened for or handed to; who connects has no
    use for it.
    """

    address: str
    keys: CurveKeys | None = None
    fd: int = -1


def open_socket(
    context: zmq.Context[Any],
    kind: int,
    where: Endpoint | str,
    *,
    bind: bool,
    options: Mapping[int, int] = NO_OPTIONS,
) -> Any:
    """A socket that loses what it has not sent when it is closed, without limits of its own but those in `options`."""
    endpoint = where if isinstance(where, Endpoint) else Endpoint(where)
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    # Bounds stand where the sender decides (ring slots, admission); a high-water mark here would drop or block silently.
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    for option, value in options.items():
        socket.setsockopt(option, value)
    if endpoint.address.startswith("tcp://"):
        assert endpoint.keys is not None, "what leaves this node is encrypted"
        _encrypt(socket, endpoint.keys, bind=bind)
        socket.setsockopt(zmq.IPV6, "[" in endpoint.address)
    if not bind:
        socket.connect(endpoint.address)
        return socket
    if endpoint.fd >= 0:
        socket.setsockopt(zmq.USE_FD, endpoint.fd)
    socket.bind(endpoint.address)
    return socket


def _encrypt(socket: Any, keys: CurveKeys, *, bind: bool) -> None:
    if bind:
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = keys.server_public, keys.server_secret
        # Without a `CurveGuard` in its context the socket refuses everybody.
        socket.setsockopt_string(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    else:
        socket.curve_serverkey = keys.server_public
        socket.curve_publickey, socket.curve_secretkey = keys.client_public, keys.client_secret


class MalformedMessageError(ValueError):
    """A socket that only this run's processes can write to has received what none of them may send: a bug."""


def _decode(decoder: msgspec.msgpack.Decoder[T], head: Any, address: str) -> T:
    """
    Raises:
        MalformedMessageError: it is no message of the socket's type.
    """
    try:
        return decoder.decode(head)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        size = memoryview(head).nbytes
        raise MalformedMessageError(f"{address}: a malformed message of {size} bytes: {error}") from error


def address_of(where: Endpoint | str) -> str:
    return where if isinstance(where, str) else where.address


class Sender(Generic[T]):
    """The sending end of a PUSH/PULL pipe of `T`. It takes any number of messages; with `max_queued`, which is for
    `send_nowait`, so many that were not sent yet."""

    def __init__(
        self, context: zmq.Context[Any], where: Endpoint | str, *, bind: bool = False, max_queued: int = 0
    ) -> None:
        self._socket = open_socket(context, zmq.PUSH, where, bind=bind, options={zmq.SNDHWM: max_queued})
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, message: T, frames: Sequence[bytes | memoryview] = ()) -> None:
        """Queue a message and the frames that belong to it. Never blocks."""
        self._socket.send_multipart([self._encoder.encode(message), *frames], copy=not frames)

    def send_nowait(self, message: T) -> bool:
        """As `send`, unless `max_queued` messages wait: then False."""
        try:
            self._socket.send(self._encoder.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def wait(self, timeout_s: float) -> bool:
        """Whether there is room for a message; sleeps up to `timeout_s` for it."""
        return bool(self._socket.poll(int(timeout_s * 1000), zmq.POLLOUT))

    def flush_and_close(self, timeout_s: float) -> None:
        """Close; wait up to `timeout_s` for what is queued to reach the peer."""
        self._socket.close(linger=int(timeout_s * 1000))


class Receiver(Generic[T]):
    """The receiving end of a PUSH/PULL pipe of `T`. `max_queued` bounds what of each sender waits here; 0: nothing does."""

    def __init__(
        self,
        context: zmq.Context[Any],
        where: Endpoint | str,
        message_type: Any,
        *,
        bind: bool = True,
        max_queued: int = 0,
    ) -> None:
        self._socket = open_socket(context, zmq.PULL, where, bind=bind, options={zmq.RCVHWM: max_queued})
        self._address = address_of(where)
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
        return _decode(self._decoder, parts[0], self._address)

    def receive(self) -> tuple[T, list[memoryview]]:
        """Wait for a message; return it with its frames."""
        head, *frames = self._socket.recv_multipart(copy=False)
        return _decode(self._decoder, head.buffer, self._address), [frame.buffer for frame in frames]

    def close(self) -> None:
        self._socket.close(linger=0)


class AsyncReceiver(Generic[T]):
    """`Receiver` for an asyncio event loop."""

    def __init__(
        self, context: zmq.asyncio.Context, where: Endpoint | str, message_type: Any, *, bind: bool = True
    ) -> None:
        self._socket = open_socket(context, zmq.PULL, where, bind=bind)
        self._address = address_of(where)
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(message_type)

    async def receive(self) -> tuple[T, list[memoryview]]:
        """Await a message; return it with its frames."""
        head, *frames = await self._socket.recv_multipart(copy=False)
        return _decode(self._decoder, head.buffer, self._address), [frame.buffer for frame in frames]

    def close(self) -> None:
        self._socket.close(linger=0)
