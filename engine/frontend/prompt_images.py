"""The images of requests, from what callers send to what ranks read: decoded off the event loop, encoded elsewhere, kept in
shared memory. An image that is known, or on its way, is not sent again."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..config import EngineConfig
from ..encoder.encoder_client import EncoderClient, EncoderError, ImageRefusedError
from ..encoder.wire import FACTS
from ..ipc.sockets import Endpoint
from ..validation.field_error import FieldError
from ..vision.image_store import (
    ImageMemoryFullError,
    ImageStore,
    ImageTooLargeError,
    OutdatedImageError,
    StoredImage,
)
from .admission import OverloadedError
from .generate_request import GenerateReqInput
from .generation_gate import UnavailableError
from .image_source import images_by_prompt, read_image
from .room_line import RoomLine
from .work_threads import WorkThreads

# Of base64 that is decoded and hashed, and of bytes that are copied.
CHAR_COST_US, BYTE_COST_US = 0.004, 0.001


@dataclass(frozen=True, eq=False)
class ImageFile:
    """What a caller has sent, its SHA-256, and in which field it stood."""

    data: bytes
    digest: bytes
    field: str


class PinnedImages:
    """By prompt. Whoever has them calls `release`."""

    def __init__(self, by_prompt: list[list[StoredImage]], pinned: list[StoredImage]) -> None:
        self.by_prompt = by_prompt
        self._pinned = pinned

    def release(self) -> None:
        for image in self._pinned:
            image.unpin()
        self.by_prompt, self._pinned = [], []


class PromptImages:
    """Lives on one event loop."""

    def __init__(self, client: EncoderClient, store: ImageStore, work_threads: WorkThreads, timeout_s: float) -> None:
        self._client = client
        self._line = RoomLine(store, timeout_s)
        self._store = store
        self._work_threads = work_threads
        self._encoding: dict[bytes, asyncio.Task[None]] = {}

    @staticmethod
    def start(
        config: EngineConfig, encoder: Endpoint, facts: Mapping[str, Any], work_threads: WorkThreads
    ) -> PromptImages:
        """For an engine with these facts."""
        store = ImageStore(config.image_memory_bytes)
        asked = {name: str(facts[name]) for name in FACTS}
        client = EncoderClient(encoder, asked, config.encoder_timeout_s, store.forget_all)
        client.start()
        return PromptImages(client, store, work_threads, config.encoder_timeout_s)

    async def pin(self, request: GenerateReqInput) -> PinnedImages:
        """All images of a request, encoded; see `RoomLine` for where there is no room. It holds what the caller sent no
        longer.

        Raises:
            ValueError: one is none, or there is never room for all; the message names it.
            UnavailableError: the encoder is down or slow.
            OverloadedError: there was no room for them in time.
        """
        by_prompt = images_by_prompt(request.image_data, len(request.prompts), is_batch=request.is_batch)
        request.image_data = None
        files = await self._read(by_prompt, is_batch=request.is_batch)
        digests = [[files[id(source)].digest for source in sources] for sources in by_prompt]
        distinct = {file.digest: file for file in files.values()}
        # What was sent as text is not held while it waits.
        del by_prompt, files
        pinned = await self._line.run(partial(self._pin_all, list(distinct.values())))
        stored = dict(zip(distinct, pinned, strict=True))
        return PinnedImages([[stored[digest] for digest in of_prompt] for of_prompt in digests], pinned)

    async def _read(self, by_prompt: list[list[str]], *, is_batch: bool) -> dict[int, ImageFile]:
        """By the identity of what the caller sent: an image that all prompts of a batch have is decoded once."""
        tasks: dict[int, asyncio.Task[ImageFile]] = {}
        for prompt, sources in enumerate(by_prompt):
            item = f".{prompt}" if is_batch else ""
            for index, source in enumerate(sources):
                if id(source) not in tasks:
                    reading = partial(read_file, source, f"image_data{item}.{index}")
                    tasks[id(source)] = asyncio.create_task(self._work_threads.run(CHAR_COST_US * len(source), reading))
        try:
            return dict(zip(tasks, await asyncio.gather(*tasks.values()), strict=True))
        finally:
            for task in tasks.values():
                task.cancel()

    async def _pin_all(self, files: Sequence[ImageFile]) -> list[StoredImage]:
        """
        Raises:
            ImageMemoryFullError: there is no room for one. None is pinned then, as with every error.
        """
        pinned: list[StoredImage] = []
        tasks = [asyncio.create_task(self._pin(file, pinned)) for file in files]
        try:
            try:
                return await asyncio.gather(*tasks)
            except ImageMemoryFullError as error:
                # Together with those that find room it may be more than there ever is.
                await asyncio.gather(*tasks, return_exceptions=True)
                self._check_together(pinned, error.num_bytes)
                # What this request alone has pinned may go for that one, and would lack room itself then. A new error: all
                # who wait for the image have that one.
                own = [self._store.arena.size_of(image.room.num_bytes) for image in pinned if image.num_pins == 1]
                raise ImageMemoryFullError(error.num_bytes + sum(own)) from error
        except BaseException:
            for task in tasks:
                task.cancel()
            for image in pinned:
                image.unpin()
            raise

    async def _pin(self, file: ImageFile, pinned: list[StoredImage]) -> StoredImage:
        while (image := self._store.get(file.digest)) is None:
            # One that nobody has pinned may have to go again before its turn here comes.
            await self._encode(file)
        image.pin()
        pinned.append(image)
        return image

    def _check_together(self, pinned: Sequence[StoredImage], num_bytes: int) -> None:
        """
        Raises:
            FieldError: with another one, of so many bytes, they take more than there is.
        """
        total = num_bytes + sum(self._store.arena.size_of(image.room.num_bytes) for image in pinned)
        if total > self._store.max_bytes:
            raise FieldError(
                f"image_data: the images take {total} bytes or more when encoded, must take at most "
                f"{self._store.max_bytes} together (--image-memory-bytes)",
                "image_data",
            )

    async def _encode(self, file: ImageFile) -> None:
        """Have it encoded and stored."""
        task = self._encoding.get(file.digest)
        if task is None:
            task = asyncio.create_task(self._fetch(file), name="encode an image")
            self._encoding[file.digest] = task
            task.add_done_callback(partial(self._end, file.digest))
        try:
            # Others may wait for the same one.
            await asyncio.shield(task)
        except (ImageRefusedError, ImageTooLargeError) as error:
            raise FieldError(f"{file.field}: the image {error}", "image_data") from None
        except (EncoderError, OutdatedImageError) as error:
            raise UnavailableError(str(error)) from None

    async def _fetch(self, file: ImageFile) -> None:
        features = await self._client.encode(file.digest, file.data)
        room = self._store.reserve(features.data.nbytes)
        try:
            writing = partial(self._store.arena.write, room.offset, features.data)
            await self._work_threads.run(BYTE_COST_US * room.num_bytes, writing)
        except OSError as error:
            self._store.give_back(room)
            raise OverloadedError(f"an image cannot be kept: {error}") from error
        self._store.add(file.digest, features, room)

    def _end(self, digest: bytes, task: asyncio.Task[None]) -> None:
        del self._encoding[digest]
        if not task.cancelled():
            # Whoever waited has it; where nobody does any more, it is nobody's.
            task.exception()

    @property
    def problem(self) -> str | None:
        return self._client.problem

    def counters(self) -> dict[str, int | float]:
        return {
            "is_encoder_up": int(self.problem is None),
            "num_images_kept": len(self._store),
            "image_memory_used_bytes": self._store.num_bytes,
            "num_images_encoding": len(self._encoding),
            "num_waiting_for_image_room": self._line.num_waiting,
            "num_images_encoded": self._client.num_encoded,
            "num_images_failed": self._client.num_failed,
            "image_encode_seconds": self._client.wait_s,
        }

    def close(self) -> None:
        self._client.close()
        self._store.close()


def read_file(source: str, field: str) -> ImageFile:
    """
    Raises:
        FieldError: as `read_image`.
    """
    data = read_image(source, field)
    return ImageFile(data, hashlib.sha256(data).digest(), field)
