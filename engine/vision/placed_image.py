"""An image at its place in a prompt, and the positions that its tokens and those behind them are turned by. Pure host code.

An image's tokens lie in a grid of height and width. All have the position in time that a token of text would have; in
height and width they count on from there. Text goes on behind the largest of them, so positions fall behind those in the
sequence, by a delta that each image changes.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import msgspec
import numpy as np


class PlacedImage(msgspec.Struct, frozen=True, array_like=True):
    """Tokens `[start, start + height * width)` of a prompt; the first is turned by `first_position`.

    What the vision tower has made of them lies in the memory at `path` from byte `offset` on, [height * width, 1 + levels,
    D] of `dtype`. Equal images have the same `number`, from 1 on, and others never.
    """

    number: int
    start: int
    height: int
    width: int
    first_position: int
    path: str
    offset: int
    dtype: str

    @property
    def num_tokens(self) -> int:
        return self.height * self.width

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def delta_behind(self) -> int:
        """What is added to the positions of the text behind it."""
        return self.first_position + max(self.height, self.width) - self.end


def images_within(images: Sequence[PlacedImage], start: int, end: int) -> tuple[int, list[PlacedImage]]:
    """The delta at `start`, and those of a prompt's images, which are in order, that have tokens in `[start, end)`."""
    first = bisect_right(images, start, key=lambda image: image.end)
    last = bisect_left(images, end, key=lambda image: image.start)
    return images[first - 1].delta_behind if first else 0, list(images[first:last])


def rope_positions(start: int, num_tokens: int, delta: int, images: Sequence[PlacedImage]) -> np.ndarray:
    """Positions [3, num_tokens] int64 in time, height and width of tokens from `start` on; see `images_within`."""
    end = start + num_tokens
    positions = np.empty((3, num_tokens), dtype=np.int64)
    done = start
    for image in images:
        first, last = max(image.start, start), min(image.end, end)
        positions[:, done - start : first - start] = np.arange(done, first) + delta
        places = np.arange(first, last) - image.start
        part = positions[:, first - start : last - start]
        part[0] = image.first_position
        part[1] = image.first_position + places // image.width
        part[2] = image.first_position + places % image.width
        done, delta = last, image.delta_behind
    positions[:, done - start :] = np.arange(done, end) + delta
    return positions
