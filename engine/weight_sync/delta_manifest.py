"""What a delta says of itself: which tensors it makes of which, and where their bytes are. Pure: no torch.

A delta takes weights from one state to the next by the values that changed. It is a manifest, which travels as JSON text,
and a payload: the bytes of all parts, one behind the other in the manifest's order. A part is one unsharded tensor:

- whole: all its values, `num_bytes` of them;
- else its values in C order, cut into chunks of `chunk_values`; the bytes of a chunk say which changed (`index`), then to
  what (`values`). No chunks at all: nothing changed, and the part says that the tensor is what it was.

index     all: no bytes | bitmap: a bit a value, the lowest of a byte first | gaps8, gaps16: for every changed value how
          many unchanged ones stand before it, as little-endian numbers of 8 or 16 bits; the largest number means that
          many places on, and no value
values    raw: as the tensor has them | steps: for every changed value how far its bits, as an integer, moved, in a signed
          byte; -128 where that does not fit, whose values follow raw behind the steps
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from .manifest import DTYPE_BYTES, TensorSpec

INDEX_KINDS = ("all", "bitmap", "gaps8", "gaps16")
VALUE_KINDS = ("raw", "steps")
# Decoding a chunk takes some 30 bytes a value at most.
DEFAULT_CHUNK_VALUES = 1 << 22
MAX_CHUNK_VALUES = 1 << 24
NUM_NAMES_SHOWN = 3
CHECKSUM = re.compile("[0-9a-f]{16}")
SEND_FULL = "send a full update"

BITS_PER_BYTE = 8
# Bytes of the numbers in which gaps are told.
GAP_BYTES = {"gaps8": 1, "gaps16": 2}


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive values of a tensor of which `num_changed` changed; with none there are no bytes."""

    index: str
    values: str
    num_changed: int
    index_bytes: int
    value_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.index_bytes + self.value_bytes


UNCHANGED = Chunk("bitmap", "raw", 0, 0, 0)


class DeltaPart(msgspec.Struct, frozen=True):
    """One tensor. `base` and `checksum` are those of all its values before and after, in `dtype`; a whole part has no
    base."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    checksum: str
    base: str | None = None
    chunks: list[Chunk] = []

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.dtype, self.shape)

    @property
    def is_whole(self) -> bool:
        return self.base is None

    @property
    def num_bytes(self) -> int:
        return self.spec.num_bytes if self.is_whole else sum(chunk.num_bytes for chunk in self.chunks)


class DeltaManifest(msgspec.Struct, frozen=True):
    """All parts of one delta, or of one bucket of it."""

    parts: list[DeltaPart]
    chunk_values: int = DEFAULT_CHUNK_VALUES

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    def placed(self) -> Iterator[tuple[DeltaPart, int]]:
        """Every part with the place of its first byte."""
        begin = 0
        for part in self.parts:
            yield part, begin
            begin += part.num_bytes

    def encode(self) -> str:
        return msgspec.json.encode(self).decode()


def parse_manifest(text: str) -> DeltaManifest:
    """
    Raises:
        ValueError: it is no manifest, or says what cannot be.
    """
    try:
        manifest = msgspec.json.decode(text, type=DeltaManifest)
    except msgspec.DecodeError as error:
        raise ValueError(f"delta: must be a manifest in JSON: {error}") from None
    if not 1 <= manifest.chunk_values <= MAX_CHUNK_VALUES:
        raise ValueError(f"delta: chunk_values={manifest.chunk_values}: must lie in 1 .. {MAX_CHUNK_VALUES}")
    if not manifest.parts:
        raise ValueError("delta: parts: must not be empty")
    names = [part.name for part in manifest.parts]
    if len(set(names)) != len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"delta: {twice!r} stands twice")
    for part in manifest.parts:
        try:
            check_part(part, manifest.chunk_values)
        except ValueError as error:
            raise ValueError(f"delta: {part.name}: {error}") from None
    return manifest


def check_part(part: DeltaPart, chunk_values: int) -> None:
    """
    Raises:
        ValueError: it contradicts itself.
    """
    if part.dtype not in DTYPE_BYTES:
        raise ValueError(f"dtype {part.dtype!r}: must be one of {', '.join(DTYPE_BYTES)}")
    if any(size < 0 for size in part.shape):
        raise ValueError(f"shape {list(part.shape)} has a negative size")
    for what, value in (("checksum", part.checksum), ("base", part.base)):
        if value is not None and not CHECKSUM.fullmatch(value):
            raise ValueError(f"{what}={value!r}: must be 16 hexadecimal digits")
    if part.is_whole and part.chunks:
        raise ValueError("a part without a base is whole and has no chunks")
    num_values = part.spec.num_values
    if part.chunks and len(part.chunks) != -(-num_values // chunk_values):
        raise ValueError(f"{len(part.chunks)} chunks of {chunk_values} are not its {num_values} values")
    for number, chunk in enumerate(part.chunks):
        size = min(chunk_values, num_values - number * chunk_values)
        try:
            check_chunk(chunk, size, DTYPE_BYTES[part.dtype])
        except ValueError as error:
            raise ValueError(f"chunk {number}: {error}") from None


def check_chunk(chunk: Chunk, num_values: int, value_bytes: int) -> None:
    """
    Raises:
        ValueError: its numbers do not fit each other.
    """
    if chunk.index not in INDEX_KINDS or chunk.values not in VALUE_KINDS:
        kinds = f"{', '.join(INDEX_KINDS)} and {', '.join(VALUE_KINDS)}"
        raise ValueError(f"{chunk.index!r}, {chunk.values!r}: must be of {kinds}")
    changed = chunk.num_changed
    if not 0 <= changed <= num_values:
        raise ValueError(f"{changed} changed values: must lie in 0 .. {num_values}")
    if changed == 0:
        if chunk.num_bytes:
            raise ValueError("without changed values it must have no bytes")
        return
    if chunk.index in GAP_BYTES:
        width = GAP_BYTES[chunk.index]
        # What means places on and no value stands for that many of them.
        largest = width * (changed + num_values // (2 ** (BITS_PER_BYTE * width) - 1))
        fits = chunk.index_bytes % width == 0 and width * changed <= chunk.index_bytes <= largest
    else:
        fits = chunk.index_bytes == (0 if chunk.index == "all" else -(-num_values // BITS_PER_BYTE))
    if not fits or (chunk.index == "all" and changed != num_values):
        raise ValueError(f"{chunk.index_bytes} bytes of {chunk.index} cannot name {changed} of {num_values} values")
    if chunk.values == "raw":
        fits = chunk.value_bytes == value_bytes * changed
    else:
        fits = (chunk.value_bytes - changed) % value_bytes == 0 and 0 <= chunk.value_bytes - changed <= (
            value_bytes * changed
        )
    if not fits:
        raise ValueError(f"{chunk.value_bytes} bytes of {chunk.values} are not {changed} values")
