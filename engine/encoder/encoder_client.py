"""A frontend's line to its encoder. Whatever becomes of that, a question ends: with an answer, or within a bound."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

import msgspec
import zmq
import zmq.asyncio

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

PING_S = 1.0
# Without a sign of it, it is taken for dead.
DOWN_S = 10.0


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
        self._socket = open_socket(self._context, zmq.DEALER, where, bind=False)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
        self._pending: dict[int, asyncio.Future[Features]] = {}
        self._number = 0
        self._incarnation = ""
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
        if time.monotonic() - self._seen > DOWN_S:
            return f"encoder {self.place}: does not answer"
        if self._refusal:
            return f"encoder {self.place}: does not fit the engine: {self._refusal}"
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
            if self._incarnation or self._refusal or time.monotonic() - self._seen > DOWN_S:
                raise EncoderError(problem)
            self._changed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), PING_S)
        if len(file) > self.max_image_bytes:
            raise ImageRefusedError(f"has {len(file)} bytes, must have at most {self.max_image_bytes}")
        self._number += 1
        number = self._number
        future = self._pending[number] = asyncio.get_running_loop().create_future()
        try:
            await self._send(Encode(number, digest), file)
            return await future
        finally:
            self._pending.pop(number, None)

    async def _send(self, request: Request, *frames: bytes) -> None:
        await self._socket.send_multipart([msgspec.msgpack.encode(request), *frames], copy=not frames)

    async def _watch(self) -> None:
        while True:
            await self._send(Ping() if self._incarnation else Hello(self._facts))
            await asyncio.sleep(PING_S)
            if time.monotonic() - self._seen > DOWN_S:
                # The next one says hello anew.
                self._leave(f"encoder {self.place}: does not answer")

    async def _watch_connection(self) -> None:
        """What was on its way is lost with the connection, whoever has ended it. The socket makes another one, and what is
        asked from then on goes there."""
        while True:
            await self._monitor.recv_multipart()
            self._fail_pending(f"encoder {self.place}: the connection has ended")

    def _leave(self, why: str) -> None:
        self._incarnation = ""
        self._fail_pending(why)
        self._changed.set()

    def _fail_pending(self, why: str) -> None:
        for future in self._pending.values():
            if not future.done():
                future.set_exception(EncoderError(why))

    async def _receive(self) -> None:
        last = ""
        while True:
            head, *frames = await self._socket.recv_multipart(copy=False)
            reply = self._decoder.decode(head.buffer)
            self._seen = time.monotonic()
            if isinstance(reply, Welcome):
                if reply.incarnation != last:
                    last = reply.incarnation
                    self._on_new_encoder(last)
                self._incarnation, self._refusal = reply.incarnation, ""
                self.max_image_bytes = reply.max_image_bytes
                self._changed.set()
            elif isinstance(reply, Refused):
                self._refusal = reply.error
                self._changed.set()
            elif isinstance(reply, Pong):
                if self._incarnation and reply.incarnation != self._incarnation:
                    self._leave(f"encoder {self.place}: has been started anew")
                    await self._send(Hello(self._facts))
            elif self._incarnation:
                self._answer(reply, frames[0].buffer if frames else memoryview(b""))

    def _answer(self, reply: Encoded | Failed, data: memoryview) -> None:
        future = self._pending.get(reply.number)
        if future is None or future.done():
            return
        if isinstance(reply, Encoded):
            future.set_result(Features(self._incarnation, reply.height, reply.width, reply.dtype, data))
        elif reply.kind == BAD_IMAGE:
            future.set_exception(ImageRefusedError(reply.error))
        else:
            future.set_exception(EncoderError(f"encoder {self.place}: {reply.error}"))
