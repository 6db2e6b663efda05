"""A frontend's line to its encoder. Whatever becomes of that, a question ends: with an answer, or within a bound."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from ..ipc.sockets import Endpoint, open_socket
from ..vision.image_store import Features
from .wire import (
    BAD_IMAGE,
    Encode,
    Encoded,
    Failed,
    Hello,
    Ping,
    Pong,
    Refused,
    Reply,
    Request,
    Welcome,
)

logger = logging.getLogger(__name__)

PING_S = 1.0
# Without a sign of it, it is taken for dead.
DOWN_S = 10.0
# Of a connection: it has ended, another attempt has failed, another one is made.
WATCHED = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_HANDSHAKE_SUCCEEDED
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class EncoderError(RuntimeError):
    """The encoder is down, has too much to do, or does not answer in time."""


class ImageRefusedError(ValueError):
    """The encoder refuses the image."""


class EncoderClient:
    """Lives on one event loop, from `start` to `close`. `on_new_encoder` is called before the first answer of an encoder
    that was not there before: its weights may be others."""

    def __init__(
        self, where: Endpoint, facts: dict[str, str], timeout_s: float, on_new_encoder: Callable[[str], None]
    ) -> None:
        self._where = where
        self._facts = facts
        self._timeout_s = timeout_s
        self._on_new_encoder = on_new_encoder
        self._context = zmq.asyncio.Context()
        # Nothing is kept for an encoder that is not there: the next one would get it.
        self._socket = open_socket(self._context, zmq.DEALER, where, bind=False, options={zmq.IMMEDIATE: 1})
        self._monitor = self._socket.get_monitor_socket(WATCHED)
        self._decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
        self._pending: dict[int, asyncio.Future[Features]] = {}
        self._number = 0
        # Of a token.
        self._num_values = (1 + int(facts["deepstack_levels"])) * int(facts["hidden_size"])
        self._incarnation = ""
        self._weights = ""
        # Whether there was a connection, and is none.
        self._is_lost = False
        # Why it is not asked, until it answers again.
        self._down = ""
        self._refusal = ""
        self._seen = time.monotonic()
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.max_image_bytes = 0
        self.num_encoded = self.num_failed = 0
        self.wait_s = 0.0

    @property
    def place(self) -> str:
        return self._where.address.removeprefix("tcp://")

    def start(self) -> None:
        self._seen = time.monotonic()
        self._tasks = [
            asyncio.create_task(self._receive(), name="encoder: answers"),
            asyncio.create_task(self._watch(), name="encoder: pings"),
            asyncio.create_task(self._watch_connection(), name="encoder: connection"),
        ]

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._fail_pending("the frontend ends")
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)
        self._context.term()

    @property
    def problem(self) -> str | None:
        """Why nothing can be encoded now; None if it can."""
        if self._down or self._refusal:
            return f"encoder {self.place}: {self._down or self._refusal}"
        return None if self._incarnation else f"encoder {self.place}: has not answered yet"

    @property
    def num_waiting(self) -> int:
        return len(self._pending)

    async def encode(self, digest: bytes, file: bytes) -> Features:
        """
        Raises:
            ImageRefusedError: it is no image that can be encoded.
            EncoderError: see there.
        """
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout_s):
                features = await self._encode(digest, file)
            self.num_encoded += 1
            return features
        except TimeoutError:
            self.num_failed += 1
            message = f"has not encoded an image within {self._timeout_s:g} s (--encoder-timeout)"
            raise EncoderError(f"encoder {self.place}: {message}") from None
        except EncoderError:
            self.num_failed += 1
            raise
        finally:
            self.wait_s += time.monotonic() - began

    async def _encode(self, digest: bytes, file: bytes) -> Features:
        while (problem := self.problem) is not None:
            if self._down or self._refusal:
                raise EncoderError(problem)
            self._changed.clear()
            await self._changed.wait()
        if len(file) > self.max_image_bytes:
            raise ImageRefusedError(
                f"has {len(file)} bytes, must have at most {self.max_image_bytes} (--max-image-bytes of the encoder)"
            )
        self._number += 1
        number = self._number
        future = self._pending[number] = asyncio.get_running_loop().create_future()
        try:
            await self._send(Encode(number, self._incarnation, digest), file)
            return await future
        finally:
            self._pending.pop(number, None)

    async def _send(self, request: Request, *frames: bytes) -> None:
        """Without a connection it is lost."""
        try:
            parts = [msgspec.msgpack.encode(request), *frames]
            await self._socket.send_multipart(parts, flags=zmq.NOBLOCK, copy=not frames)
        except zmq.Again:
            self._lose()

    async def _watch(self) -> None:
        while True:
            await self._send(Ping() if self._incarnation else Hello(self._facts))
            await asyncio.sleep(PING_S)
            if time.monotonic() - self._seen > DOWN_S and not self._down:
                self._leave("does not answer", is_down=True)

    async def _watch_connection(self) -> None:
        """The socket tries to make another connection; what is asked meanwhile waits for it. Where that is refused, there
        is no encoder any more."""
        while True:
            event = (await recv_monitor_message(self._monitor))["event"]
            if event == zmq.EVENT_DISCONNECTED:
                self._lose()
            elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._is_lost = False
                await self._send(Hello(self._facts))
            elif self._is_lost and not self._down:
                self._leave("is gone", is_down=True)

    def _lose(self) -> None:
        """What was on its way is lost with the connection, whoever has ended it."""
        if self._incarnation:
            self._is_lost = True
            self._leave("the connection has ended", is_down=False)

    def _leave(self, why: str, *, is_down: bool) -> None:
        """Who waits is told; the next answer is that to a hello."""
        self._incarnation = ""
        self._down = why if is_down else ""
        self._fail_pending(f"encoder {self.place}: {why}")
        self._changed.set()

    def _fail_pending(self, why: str) -> None:
        for future in self._pending.values():
            if not future.done():
                future.set_exception(EncoderError(why))

    async def _receive(self) -> None:
        last = ""
        while True:
            head, *frames = await self._socket.recv_multipart(copy=False)
            try:
                reply = self._decoder.decode(head.buffer)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                # Of another version, which never welcomes.
                logger.warning("encoder %s: a message was not understood: %s", self.place, error)
                continue
            self._seen = time.monotonic()
            if isinstance(reply, Welcome):
                if reply.incarnation != last:
                    last = reply.incarnation
                    self._on_new_encoder(last)
                self._incarnation, self._refusal, self._down = reply.incarnation, "", ""
                self.max_image_bytes, self._weights = reply.max_image_bytes, reply.weights
                self._changed.set()
            elif isinstance(reply, Refused):
                self._refusal, self._down = f"does not fit the engine: {reply.error}", ""
                self._changed.set()
            elif isinstance(reply, Pong):
                if self._incarnation and reply.incarnation != self._incarnation:
                    self._leave("has been started anew", is_down=False)
                    await self._send(Hello(self._facts))
            elif self._incarnation:
                self._answer(reply, frames[0].buffer if frames else memoryview(b""))

    def _answer(self, reply: Encoded | Failed, data: memoryview) -> None:
        future = self._pending.get(reply.number)
        if future is None or future.done():
            return
        if isinstance(reply, Encoded) and data.nbytes != self._num_bytes(reply):
            future.set_exception(EncoderError(f"encoder {self.place}: has sent {data.nbytes} bytes for {reply}"))
        elif isinstance(reply, Encoded):
            made = Features(self._incarnation, self._weights, reply.height, reply.width, reply.dtype, data)
            future.set_result(made)
        elif reply.kind == BAD_IMAGE:
            future.set_exception(ImageRefusedError(reply.error))
        else:
            future.set_exception(EncoderError(f"encoder {self.place}: {reply.error}"))

    def _num_bytes(self, reply: Encoded) -> int:
        """That an image's features have; 0 where its numbers are of no kind that is known."""
        return reply.height * reply.width * self._num_values * ITEM_BYTES.get(reply.dtype, 0)
