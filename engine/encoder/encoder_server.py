"""The encoder's socket: one thread answers, one encodes. What waits and what is kept are bounded. An image that several
frontends ask for, as the two sides of a request do, is encoded once."""

from __future__ import annotations

import hashlib
import logging
import queue
import uuid
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Protocol

import msgspec

from ..ipc.critical_thread import start_critical_thread
from ..ipc.router_loop import RouterLoop
from ..ipc.sockets import Endpoint
from .tower import BadImageError, EncodedImage
from .wire import (
    BAD_IMAGE,
    FAULT,
    OVERLOADED,
    Encoded,
    Failed,
    Hello,
    Ping,
    Pong,
    Refused,
    Reply,
    Request,
    Welcome,
    difference,
)

logger = logging.getLogger(__name__)


class Tower(Protocol):
    """See `VisionTower`."""

    facts: dict[str, str]
    weights: str

    def encode(self, file: bytes) -> EncodedImage: ...


@dataclass(frozen=True)
class EncoderLimits:
    """Images that wait, bytes of encoded ones that are kept, and of one image's file."""

    max_waiting: int
    cache_bytes: int
    max_image_bytes: int


class EncodedCache:
    """Encoded images by the SHA-256 of their files, those that were asked for last."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._images: OrderedDict[bytes, EncodedImage] = OrderedDict()
        self.num_bytes = 0

    def get(self, digest: bytes) -> EncodedImage | None:
        if digest in self._images:
            self._images.move_to_end(digest)
        return self._images.get(digest)

    def add(self, digest: bytes, image: EncodedImage) -> None:
        if digest in self._images:
            return
        self._images[digest] = image
        self.num_bytes += len(image.features)
        while self.num_bytes > self._max_bytes:
            _, oldest = self._images.popitem(last=False)
            self.num_bytes -= len(oldest.features)


@dataclass(frozen=True)
class _Question:
    sender: bytes
    number: int


@dataclass(frozen=True)
class _Job:
    digest: bytes
    file: bytes


class EncoderServer:
    """`run` serves until the process ends."""

    def __init__(self, where: Endpoint, tower: Tower, limits: EncoderLimits) -> None:
        self._loop: RouterLoop[Request] = RouterLoop(where, Request, on_request=self._handle, on_wake=self._answer_done)
        self._tower = tower
        self._limits = limits
        self._incarnation = uuid.uuid4().hex
        self._cache = EncodedCache(limits.cache_bytes)
        self._jobs: queue.Queue[_Job] = queue.Queue(limits.max_waiting)
        # Of each image that waits or is encoded.
        self._questions: dict[bytes, list[_Question]] = {}
        self._done: deque[tuple[bytes, EncodedImage | Failed]] = deque()

    def run(self) -> None:
        start_critical_thread(self._work, "vision tower")
        self._loop.run()

    def _handle(self, sender: bytes, request: Request, frames: list[bytes]) -> None:
        if isinstance(request, Ping):
            self._loop.send(sender, Pong(self._incarnation, self._jobs.qsize()))
        elif isinstance(request, Hello):
            self._loop.send(sender, self._greet(request))
        elif request.incarnation != self._incarnation:
            self._loop.send(sender, Failed(request.number, FAULT, "has been started anew"))
        else:
            self._take(_Question(sender, request.number), _Job(request.digest, frames[0] if frames else b""))

    def _greet(self, hello: Hello) -> Reply:
        refusal = difference(hello.facts, self._tower.facts)
        if refusal:
            return Refused(refusal)
        return Welcome(self._incarnation, self._limits.max_image_bytes, self._tower.weights)

    def _take(self, question: _Question, job: _Job) -> None:
        known = self._cache.get(job.digest)
        if known is not None:
            self._answer(question, known)
            return
        if job.digest in self._questions:
            self._questions[job.digest].append(question)
            return
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            error = f"{self._limits.max_waiting} images wait already (--max-waiting)"
            self._answer(question, Failed(question.number, OVERLOADED, error))
        else:
            self._questions[job.digest] = [question]

    def _answer_done(self) -> None:
        while self._done:
            digest, result = self._done.popleft()
            if isinstance(result, EncodedImage):
                self._cache.add(digest, result)
            for question in self._questions.pop(digest):
                self._answer(question, result)

    def _answer(self, question: _Question, result: EncodedImage | Failed) -> None:
        if isinstance(result, Failed):
            self._loop.send(question.sender, msgspec.structs.replace(result, number=question.number))
        else:
            head = Encoded(question.number, result.height, result.width, result.dtype)
            self._loop.send(question.sender, head, [result.features])

    # --- the other thread -------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            self._done.append((job.digest, self._encode(job)))
            self._loop.wake()

    def _encode(self, job: _Job) -> EncodedImage | Failed:
        """A failure has the number of no question yet."""
        if hashlib.sha256(job.file).digest() != job.digest:
            return Failed(0, FAULT, "the image has another SHA-256 than was said")
        try:
            return self._tower.encode(job.file)
        except BadImageError as error:
            return Failed(0, BAD_IMAGE, str(error))
        # One image's: memory that it lacks, say. Others go on.
        except Exception as error:
            logger.exception("an image could not be encoded")
            return Failed(0, FAULT, f"{type(error).__name__}: {error}")
