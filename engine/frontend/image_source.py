"""Images as callers give them: data URIs, or base64 alone."""

from __future__ import annotations

import binascii
import re
from typing import Any

from ..validation.field_error import FieldError

DATA_URI = re.compile(
    r"\s*(?i:data):(?P<type>[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[\w.+-]*)*(?P<base64>;base64)?,", re.ASCII
)
# Of a place: a scheme, or a path.
PLACE = re.compile(r"\s*(?:[A-Za-z][A-Za-z0-9+.-]*:|[/.~])")
# Base64 has neither a colon nor a dot, and begins with a slash where it is a JPEG's.
JPEG = "/9j/"
# Shown of what is refused.
MAX_SHOWN = 40
MAX_IMAGES = 64
WHAT_WORKS = "give it as a data URI, data:image/png;base64,..."


def read_image(source: str, field: str) -> bytes:
    """The image's file.

    Raises:
        FieldError: it is a place, which is not looked up, or no base64.
    """
    shown = source[:MAX_SHOWN] + ("..." if len(source) > MAX_SHOWN else "")
    found = DATA_URI.match(source)
    if found is not None:
        if found["base64"] is None:
            raise FieldError(f"{field}: {shown!r} must be base64: {WHAT_WORKS}", field)
        if found["type"] is not None and not found["type"].startswith("image/"):
            raise FieldError(f"{field}: {found['type']} is no image: {WHAT_WORKS}", field)
        source = source[found.end() :]
    elif (PLACE.match(source) or "." in source) and not source.startswith(JPEG):
        raise FieldError(f"{field}: {shown!r}: files and URLs are not fetched; {WHAT_WORKS}", field)
    try:
        file = binascii.a2b_base64(source, strict_mode=True)
    except ValueError as error:
        raise FieldError(f"{field}: {shown!r} is no base64: {error}; {WHAT_WORKS}", field) from None
    if not file:
        raise FieldError(f"{field}: the image is empty; {WHAT_WORKS}", field)
    return file


def images_by_prompt(image_data: Any, num_prompts: int, *, is_batch: bool) -> list[list[str]]:
    """What each prompt has: one image, a list of them, or none.

    Raises:
        FieldError: there is not one entry for each prompt of a batch, or too many images.
    """
    field = "image_data"
    if image_data is None:
        return [[] for _ in range(num_prompts)]
    entries = image_data if is_batch and isinstance(image_data, list) else [image_data] * num_prompts
    if len(entries) != num_prompts:
        raise FieldError(f"{field}: has {len(entries)} entries, must have one per prompt, {num_prompts}", field)
    found: list[list[str]] = []
    for entry in entries:
        images = [] if entry is None else [entry] if isinstance(entry, str) else entry
        if not all(isinstance(image, str) for image in images):
            raise FieldError(f"{field}: the images of a prompt must be a string or a list of strings", field)
        if len(images) > MAX_IMAGES:
            raise FieldError(f"{field}: a prompt has {len(images)} images, must have at most {MAX_IMAGES}", field)
        found.append(list(images))
    return found
