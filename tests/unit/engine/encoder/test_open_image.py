"""Files that are images: what becomes of those with more than colours, and what is refused."""

from __future__ import annotations

import io
import re
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from waybill.engine.encoder.tower import BadImageError, ImageLimits, open_image

LIMITS = ImageLimits(1 << 20, 1 << 12)
COLOURS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
PICTURE = Image.fromarray(COLOURS)
ORIENTATION = 0x0112


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def empty_png(width: int, height: int) -> bytes:
    """One that says to be so large, and has no pixels."""
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return file_of(PICTURE, "JPEG", exif=exif)


def with_alpha() -> Image.Image:
    image = PICTURE.convert("RGBA")
    image.putalpha(90)
    return image


def palette_with_transparency() -> bytes:
    return file_of(PICTURE.convert("P", palette=Image.Palette.ADAPTIVE), transparency=3)


FILES = {
    "png": file_of(PICTURE),
    "alpha": file_of(with_alpha()),
    "palette": palette_with_transparency(),
    "grey": file_of(PICTURE.convert("L")),
    "grey and alpha": file_of(PICTURE.convert("LA")),
    "bits": file_of(PICTURE.convert("1")),
    "16 bits": file_of(Image.fromarray(COLOURS[:, :, 0].astype(np.uint16) * 200)),
    "cmyk": file_of(PICTURE.convert("CMYK"), "JPEG"),
    "upside down": turned(3),
    "on its side": turned(6),
    "mirrored on its side": turned(7),
    "webp": file_of(PICTURE, "WEBP", lossless=True),
    "bmp": file_of(PICTURE, "BMP"),
    "tiff": file_of(PICTURE, "TIFF"),
    "frames": file_of(PICTURE, "GIF", save_all=True, append_images=[Image.new("RGB", (40, 24), "red")]),
    "animated png": file_of(PICTURE, "PNG", save_all=True, append_images=[Image.new("RGB", (40, 24), "red")]),
    "one pixel": file_of(Image.new("RGB", (1, 1))),
}


@pytest.mark.parametrize("name", FILES)
def test_an_image_is_what_transformers_makes_of_it(name: str, tmp_path: Any) -> None:
    (tmp_path / "image").write_bytes(FILES[name])
    found, expected = open_image(FILES[name], LIMITS), load_image(str(tmp_path / "image"))
    assert found.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"hello", "is in none of the formats PNG, JPEG, "),
        # A program would have to run for it.
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n", "is in none of the formats"),
        (file_of(PICTURE, "TGA"), "is in none of the formats"),
        (FILES["png"][:200], "cannot be read: "),
        (empty_png(0, 24), "is in none of the formats"),
        (empty_png(2**31 - 1, 2**31 - 1), "exceeds limit"),
        (empty_png(24, 24), "cannot be read: "),
        (file_of(Image.new("RGB", (64, 65))), "is 64 x 65, must have at most 4096 pixels (--max-image-pixels)"),
        (FILES["png"] + bytes(1 << 20), "bytes, must have at most 1048576 (--max-image-bytes)"),
    ],
)
def test_what_is_none_is_refused(file: bytes, message: str) -> None:
    with pytest.raises(BadImageError, match=re.escape(message)):
        open_image(file, LIMITS)
