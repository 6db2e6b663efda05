"""The images of requests, from what callers send to what ranks read: decoded off the event loop, encoded elsewhere, kept in
shared memory. An image that is known, or on its way, is not sent again."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
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
from .work_threads import WorkThreads

# Of base64 that is decoded and hashed, and of bytes that are copied.
CHAR_COST_US, BYTE_COST_US = 0.004, 0.001


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

    def __init__(self, client: EncoderClient, store: ImageStore, work_threads: WorkThreads) -> None:
        self._client = client
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
        return PromptImages(client, store, work_threads)

    async def pin(self, request: GenerateReqInput) -> PinnedImages:
        """All images of a request, encoded. It holds what the caller sent no longer.

        Raises:
            ValueError: one is none; the message names it.
            UnavailableError: the encoder is down or slow.
            OverloadedError: there is no room for it.
        """
        by_prompt = images_by_prompt(request.image_data, len(request.prompts), is_batch=request.is_batch)
        request.image_data = None
        # One that all prompts of a batch have is decoded once.
        tasks: dict[int, asyncio.Task[StoredImage]] = {}
        for prompt, sources in enumerate(by_prompt):
            item = f".{prompt}" if request.is_batch else ""
            for index, source in enumerate(sources):
                if id(source) not in tasks:
                    tasks[id(source)] = asyncio.create_task(self._pin(source, f"image_data{item}.{index}"))
        try:
            pinned = await asyncio.gather(*tasks.values())
        except BaseException:
            for task in tasks.values():
                task.cancel()
            for result in await asyncio.gather(*tasks.values(), return_exceptions=True):
                if isinstance(result, StoredImage):
                    result.unpin()
            raise
        return PinnedImages([[tasks[id(source)].result() for source in sources] for sources in by_prompt], pinned)

    async def _pin(self, source: str, field: str) -> StoredImage:
        digest, file = await self._work_threads.run(CHAR_COST_US * len(source), partial(_read, source, field))
        while (image := self._store.get(digest)) is None:
            # One that nobody has pinned may have to go again before its turn here comes.
            await self._encode(digest, file, field)
        image.pin()
        return image

    async def _encode(self, digest: bytes, file: bytes, field: str) -> None:
        """Have it encoded and stored."""
        task = self._encoding.get(digest)
        if task is None:
            task = self._encoding[digest] = asyncio.create_task(self._fetch(digest, file), name="encode an image")
            task.add_done_callback(partial(self._end, digest))
        try:
            # Others may wait for the same one.
            await asyncio.shield(task)
        except (ImageRefusedError, ImageTooLargeError) as error:
            raise FieldError(f"{field}: the image {error}", "image_data") from None
        except (EncoderError, OutdatedImageError) as error:
            raise UnavailableError(str(error)) from None
        except ImageMemoryFullError as error:
            raise OverloadedError(str(error)) from None

    async def _fetch(self, digest: bytes, file: bytes) -> None:
        features = await self._client.encode(digest, file)
        room = self._store.reserve(features.data.nbytes)
        try:
            writing = partial(self._store.arena.write, room.offset, features.data)
            await self._work_threads.run(BYTE_COST_US * room.num_bytes, writing)
        except OSError as error:
            self._store.give_back(room)
            raise ImageMemoryFullError(f"an image cannot be kept: {error}") from error
        self._store.add(digest, features, room)

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
            "num_images_encoded": self._client.num_encoded,
            "num_images_failed": self._client.num_failed,
            "image_encode_seconds": self._client.wait_s,
        }

    def close(self) -> None:
        self._client.close()
        self._store.close()


def _read(source: str, field: str) -> tuple[bytes, bytes]:
    file = read_image(source, field)
    return hashlib.sha256(file).digest(), file
