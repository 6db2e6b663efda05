"""The frontend's encoded images, in shared memory that ranks map. Each is a memfd: it has no name, and is gone with the
last process that has it."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from dataclasses import dataclass, field

# Images whose numbers are remembered, longer than what was made of them: the prefix cache knows them by these.
MAX_NUMBERS = 1 << 16
# What a step that was launched may still be about to map.
KEEP_S = 5.0


class OutdatedImageError(RuntimeError):
    """What has encoded an image is gone."""


class ImageMemoryFullError(RuntimeError):
    """Images of requests that run take all of it."""


@dataclass(frozen=True)
class Features:
    """What the tower of an encoder has made of an image's grid of tokens: the bytes of [height * width, 1 + levels, D]."""

    incarnation: str
    height: int
    width: int
    dtype: str
    data: memoryview


def fill_memory(data: memoryview) -> int:
    """The descriptor of new shared memory that holds the bytes."""
    fd = os.memfd_create("waybill-image", os.MFD_CLOEXEC)
    written = 0
    while written < data.nbytes:
        written += os.write(fd, data[written:])
    return fd


@dataclass(eq=False)
class StoredImage:
    """One image's features. Whoever pins it has it until `unpin`."""

    number: int
    height: int
    width: int
    dtype: str
    num_bytes: int
    fd: int
    num_pins: int = 0
    used_at: float = field(default_factory=time.monotonic)

    @property
    def path(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    @property
    def num_tokens(self) -> int:
        return self.height * self.width

    def pin(self) -> None:
        self.num_pins += 1

    def unpin(self) -> None:
        assert self.num_pins > 0
        self.num_pins -= 1
        self.used_at = time.monotonic()

    @property
    def can_go(self) -> bool:
        return self.num_pins == 0 and time.monotonic() - self.used_at > KEEP_S


class ImageStore:
    """By the SHA-256 of their files; the least recently used ones go first. Lives on one event loop."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._images: OrderedDict[bytes, StoredImage] = OrderedDict()
        # Of another encoder: nobody finds them any more.
        self._outdated: list[StoredImage] = []
        self._numbers: OrderedDict[bytes, int] = OrderedDict()
        self._last_number = 0
        self._incarnation = ""
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._images)

    def get(self, digest: bytes) -> StoredImage | None:
        image = self._images.get(digest)
        if image is not None:
            self._images.move_to_end(digest)
            image.used_at = time.monotonic()
        return image

    def add(self, digest: bytes, features: Features, fd: int) -> StoredImage:
        """`fd` is memory that has been filled, see `fill_memory`; it is the store's from here on.

        Raises:
            OutdatedImageError: there has come another encoder since.
            ImageMemoryFullError: there is no room for it.
        """
        num_bytes = features.data.nbytes
        try:
            if features.incarnation != self._incarnation:
                raise OutdatedImageError("the encoder has been started anew")
            self._make_room(num_bytes)
        except BaseException:
            os.close(fd)
            raise
        number = self._number_of(digest)
        image = StoredImage(number, features.height, features.width, features.dtype, num_bytes, fd)
        self._images[digest] = image
        self.num_bytes += num_bytes
        return image

    def _number_of(self, digest: bytes) -> int:
        if digest not in self._numbers:
            self._last_number += 1
            self._numbers[digest] = self._last_number
            if len(self._numbers) > MAX_NUMBERS:
                self._numbers.popitem(last=False)
        self._numbers.move_to_end(digest)
        return self._numbers[digest]

    def _make_room(self, num_bytes: int) -> None:
        for image in [image for image in self._outdated if image.can_go]:
            self._outdated.remove(image)
            self._free(image)
        for digest, image in list(self._images.items()):
            if self.num_bytes + num_bytes <= self._max_bytes:
                return
            if image.can_go:
                del self._images[digest]
                self._free(image)
        if self.num_bytes + num_bytes > self._max_bytes:
            raise ImageMemoryFullError(
                f"{self.num_bytes} bytes of images are in use, and one needs {num_bytes} more: at most {self._max_bytes} "
                "may be (--image-memory-bytes)"
            )

    def _free(self, image: StoredImage) -> None:
        self.num_bytes -= image.num_bytes
        os.close(image.fd)

    def forget_all(self, incarnation: str) -> None:
        """There is another encoder, of this name: images come again under other numbers."""
        self._outdated += self._images.values()
        self._images.clear()
        self._numbers.clear()
        self._incarnation = incarnation

    def close(self) -> None:
        for image in [*self._images.values(), *self._outdated]:
            os.close(image.fd)
        self._images.clear()
        self._outdated.clear()
