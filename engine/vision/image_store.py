"""The frontend's encoded images, in shared memory that ranks read."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from .image_arena import ImageArena

# Images whose numbers are remembered, longer than what was made of them: the prefix cache knows them by these.
MAX_NUMBERS = 1 << 16


class OutdatedImageError(RuntimeError):
    """What has encoded an image is gone."""


class ImageMemoryFullError(RuntimeError):
    """Images that are in use take all of it, and one more would take `num_bytes`."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__(f"no room for {num_bytes} bytes of an image")
        self.num_bytes = num_bytes


class ImageTooLargeError(ValueError):
    """It takes more than there is for all."""


@dataclass(frozen=True)
class Features:
    """What the tower of an encoder, of these weights, has made of an image's grid of tokens: the bytes of [height * width,
    1 + levels, D]."""

    incarnation: str
    weights: str
    height: int
    width: int
    dtype: str
    data: memoryview


@dataclass(frozen=True)
class Room:
    """A place in the arena."""

    offset: int
    num_bytes: int


@dataclass(eq=False)
class StoredImage:
    """One image's features. Whoever pins it has it until `unpin`. Where other engines' stores have an image of the same
    `content`, it is the same file, and weights that are alike have encoded it; `number` is this store's alone."""

    number: int
    content: bytes
    height: int
    width: int
    dtype: str
    path: str
    room: Room
    num_pins: int = 0
    on_unused: Callable[[], object] | None = None

    @property
    def num_tokens(self) -> int:
        return self.height * self.width

    def pin(self) -> None:
        self.num_pins += 1

    def unpin(self) -> None:
        assert self.num_pins > 0
        self.num_pins -= 1
        if self.num_pins == 0 and self.on_unused is not None:
            self.on_unused()


def content_of(digest: bytes, features: Features) -> bytes:
    """See `StoredImage`; of the SHA-256 of a file."""
    made_by = f"{features.weights} {features.height} {features.width}".encode()
    return hashlib.sha256(digest + made_by).digest()


class ImageStore:
    """By the SHA-256 of their files; the least recently used ones go first. Lives on one event loop.

    A request pins its images until its end is told. Every rank has read by then what it computed: the leader commits what
    is in flight before it ends a request, and a step needs all ranks.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        # Set whenever there may be room that was not there before.
        self.room_made = asyncio.Event()
        self.arena = ImageArena()
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
        return image

    def reserve(self, num_bytes: int) -> Room:
        """Room for an image, to be filled, and then given to `add` or back.

        Raises:
            ImageMemoryFullError: there is none.
            ImageTooLargeError: there never is.
        """
        size = self.arena.size_of(num_bytes)
        if size > self.max_bytes:
            raise ImageTooLargeError(
                f"takes {size} bytes when encoded, must take at most {self.max_bytes} (--image-memory-bytes)"
            )
        self._make_room(size)
        self.num_bytes += size
        return Room(self.arena.allocate(num_bytes), num_bytes)

    def give_back(self, room: Room) -> None:
        self.arena.free(room.offset, room.num_bytes)
        self.num_bytes -= self.arena.size_of(room.num_bytes)
        self.room_made.set()

    def has_room(self, num_bytes: int) -> bool:
        """Whether so many could be taken, if what nobody has pinned goes."""
        return self._num_used() + num_bytes <= self.max_bytes

    def add(self, digest: bytes, features: Features, room: Room) -> StoredImage:
        """`room` holds the image's features; it is the store's from here on.

        Raises:
            OutdatedImageError: there has come another encoder since.
        """
        if features.incarnation != self._incarnation:
            self.give_back(room)
            raise OutdatedImageError("the encoder has been started anew")
        number = self._number_of(digest)
        image = StoredImage(
            number,
            content_of(digest, features),
            features.height,
            features.width,
            features.dtype,
            self.arena.path,
            room,
            on_unused=self.room_made.set,
        )
        # Until it is pinned it may go for another one.
        self.room_made.set()
        self._images[digest] = image
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
        self._free_outdated()
        if not self.has_room(num_bytes):
            raise ImageMemoryFullError(num_bytes)
        for digest, image in [(digest, image) for digest, image in self._images.items() if image.num_pins == 0]:
            if self.num_bytes + num_bytes <= self.max_bytes:
                return
            del self._images[digest]
            self.give_back(image.room)

    def _num_used(self) -> int:
        """Bytes that have to stay."""
        unused = [image for image in (*self._images.values(), *self._outdated) if image.num_pins == 0]
        return self.num_bytes - sum(self.arena.size_of(image.room.num_bytes) for image in unused)

    def _free_outdated(self) -> None:
        for image in [image for image in self._outdated if image.num_pins == 0]:
            self._outdated.remove(image)
            self.give_back(image.room)

    def forget_all(self, incarnation: str) -> None:
        """There is another encoder, of this name: images come again under other numbers."""
        self._outdated += self._images.values()
        self._images.clear()
        self._numbers.clear()
        self._incarnation = incarnation
        self._free_outdated()

    def close(self) -> None:
        self.arena.close()
