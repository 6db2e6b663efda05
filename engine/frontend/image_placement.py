"""Images at their places in a prompt: placeholders become as many as the image has tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..validation.field_error import FieldError
from ..validation.token_ids import Ids
from ..vision.image_store import StoredImage
from ..vision.placed_image import PlacedImage
from .request_limits import EngineLimits


@dataclass(frozen=True)
class PlacedPrompt:
    """A prompt's ids with all placeholders, what caches know it by, and its images, which `stored` holds."""

    input_ids: Ids
    cache_ids: Ids
    images: tuple[PlacedImage, ...]
    stored: tuple[StoredImage, ...]


def placeholder_runs(input_ids: Ids, token_id: int) -> list[tuple[int, int]]:
    """Where placeholders stand side by side: `[start, end)`."""
    is_one = np.concatenate(([False], input_ids == token_id, [False]))
    edges = np.flatnonzero(is_one[1:] != is_one[:-1]).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def place_images(input_ids: Ids, images: Sequence[StoredImage], token_id: int) -> PlacedPrompt:
    """A run of placeholders for each image: one, as templates write it, or all of them, as answers have them.

    Raises:
        FieldError: there are other numbers of them.
    """
    runs = placeholder_runs(input_ids, token_id)
    if len(runs) != len(images):
        raise FieldError(
            f"image_data: {len(images)} images for {len(runs)} places in the prompt (runs of the placeholder's token, "
            f"{token_id}, with others between them); must be as many",
            "image_data",
        )
    pieces: list[Ids] = []
    keys: list[Ids] = []
    placed: list[PlacedImage] = []
    done = length = delta = 0
    for index, ((start, end), image) in enumerate(zip(runs, images, strict=True)):
        if end - start not in (1, image.num_tokens):
            raise FieldError(
                f"image_data.{index}: the image takes {image.num_tokens} tokens ({image.height} x {image.width}); the "
                f"prompt has {end - start} placeholders for it, must have 1 or {image.num_tokens}",
                "image_data",
            )
        text = input_ids[done:start]
        length += len(text)
        place = image.path, image.room.offset, image.dtype
        one = PlacedImage(image.number, length, image.height, image.width, length + delta, *place)
        placed.append(one)
        pieces += [text, np.full(image.num_tokens, token_id, np.int32)]
        keys += [text, np.full(image.num_tokens, -image.number, np.int32)]
        done, length, delta = end, one.end, one.delta_behind
    rest = input_ids[done:]
    return PlacedPrompt(
        np.concatenate([*pieces, rest]).astype(np.int32),
        np.concatenate([*keys, rest]).astype(np.int32),
        tuple(placed),
        tuple(images),
    )


def with_images(
    prompt: str | Ids, images: Sequence[StoredImage], limits: EngineLimits, encode: Callable[[str], list[int]]
) -> Ids | PlacedPrompt | str:
    """The prompt with its images, if it has any.

    Raises:
        FieldError: its placeholders do not fit them.
    """
    if not images:
        return prompt
    assert limits.image_token_id is not None, "there is an encoder"
    ids = np.array(encode(prompt), dtype=np.int32) if isinstance(prompt, str) else prompt
    return place_images(ids, images, limits.image_token_id)
