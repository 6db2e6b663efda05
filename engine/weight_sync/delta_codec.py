"""Chunks of a delta: which values changed and to what, as bytes and back. On any device, without a loop over values.

Bits are compared, so NaNs with another payload and -0.0 beside 0.0 are changes like any other. The forms are described
in `delta_manifest.py`; the smaller one is chosen, chunk by chunk.

Legend: N values of a chunk, C of them changed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .checksum import BITS
from .delta_manifest import BITS_PER_BYTE, GAP_BYTES, UNCHANGED, Chunk

GAP_DTYPES = {"gaps8": torch.uint8, "gaps16": torch.int16}
MAX_STEP = 127
# Of a step that does not fit.
ESCAPE = -128


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """Its values as integers, a view."""
    return tensor.view(BITS[tensor.itemsize])


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def changed_places(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Of bits [N] before and after: int64 [C], ascending."""
    return (old != new).nonzero().flatten()


def encode_chunk(old: torch.Tensor, new: torch.Tensor, places: torch.Tensor) -> tuple[Chunk, list[torch.Tensor]]:
    """Bits [N] before and after, and where they differ -> the chunk, and its bytes in pieces, in order."""
    changed = len(places)
    if changed == 0:
        return UNCHANGED, []
    index = smallest_index(places, len(new))
    kept_steps = takes_steps(old, new, places)
    # With most values changed it may take less to send them all than to say which.
    if index_size(index, places, len(new)) + changed * value_size(new, kept_steps) >= len(new) * value_size(
        new, kept_steps
    ):
        index, places = "all", torch.arange(len(new), device=new.device)
    index_data = encode_index(index, places, len(new))
    value_data = encode_steps(old[places], new[places]) if kept_steps else [as_bytes(new[places])]
    chunk = Chunk(
        index,
        "steps" if kept_steps else "raw",
        len(places),
        index_data.nbytes,
        sum(part.nbytes for part in value_data),
    )
    return chunk, [index_data, *value_data]


def value_size(new: torch.Tensor, as_steps: bool) -> int:
    return 1 if as_steps else new.itemsize


def takes_steps(old: torch.Tensor, new: torch.Tensor, places: torch.Tensor) -> bool:
    """Whether steps of a byte are smaller than the values themselves."""
    if new.itemsize == 1:
        return False
    num_escaped = int(is_escaped(new[places] - old[places]).sum())
    return len(places) + num_escaped * new.itemsize < len(places) * new.itemsize


def is_escaped(steps: torch.Tensor) -> torch.Tensor:
    # Not by the absolute value, which the smallest integer has none of.
    return (steps > MAX_STEP) | (steps < -MAX_STEP)


def encode_steps(old: torch.Tensor, new: torch.Tensor) -> list[torch.Tensor]:
    """Integers wrap, here and where steps are added."""
    steps = new - old
    escaped = is_escaped(steps)
    steps[escaped] = ESCAPE
    return [as_bytes(steps.to(torch.int8)), as_bytes(new[escaped])]


def gaps_of(places: torch.Tensor) -> torch.Tensor:
    """How many values stand between each changed one and the one before it."""
    return places.diff(prepend=places.new_tensor([-1])) - 1


def index_size(kind: str, places: torch.Tensor, num_values: int) -> int:
    if kind == "bitmap":
        return -(-num_values // BITS_PER_BYTE)
    width = GAP_BYTES[kind]
    largest = 2 ** (BITS_PER_BYTE * width) - 1
    return width * (len(places) + int((gaps_of(places) // largest).sum()))


def smallest_index(places: torch.Tensor, num_values: int) -> str:
    return min(("bitmap", "gaps8", "gaps16"), key=lambda kind: index_size(kind, places, num_values))


def encode_index(kind: str, places: torch.Tensor, num_values: int) -> torch.Tensor:
    """Bytes that name the places [C], which ascend."""
    if kind == "all":
        return torch.empty(0, dtype=torch.uint8, device=places.device)
    if kind == "bitmap":
        bits = torch.zeros(-(-num_values // BITS_PER_BYTE) * BITS_PER_BYTE, dtype=torch.uint8, device=places.device)
        bits[places] = 1
        powers = 1 << torch.arange(BITS_PER_BYTE, dtype=torch.uint8, device=places.device)
        return (bits.view(-1, BITS_PER_BYTE) * powers).sum(1, dtype=torch.uint8)
    largest = 2 ** (BITS_PER_BYTE * GAP_BYTES[kind]) - 1
    gaps = gaps_of(places)
    ends = (gaps // largest + 1).cumsum(0)
    # Signed integers have the bits of the largest number as -1.
    fill = largest if kind == "gaps8" else -1
    numbers = torch.full((int(ends[-1]),), fill, dtype=GAP_DTYPES[kind], device=places.device)
    numbers[ends - 1] = (gaps % largest).to(GAP_DTYPES[kind])
    return as_bytes(numbers)


def aligned(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bytes as values; copied where they begin at a place that the dtype does not allow."""
    return (data if data.storage_offset() % dtype.itemsize == 0 else data.clone()).view(dtype)


def decode_places(chunk: Chunk, data: torch.Tensor, num_values: int) -> torch.Tensor:
    """int64 [C], ascending, of the bytes of a chunk.

    Raises:
        ValueError: they name another number of values, or some beyond the last.
    """
    index = data[: chunk.index_bytes]
    if chunk.index == "all":
        return torch.arange(num_values, device=data.device)
    if chunk.index == "bitmap":
        shifts = torch.arange(BITS_PER_BYTE, dtype=torch.uint8, device=data.device)
        places = ((index[:, None] >> shifts) & 1).flatten().nonzero().flatten()
    else:
        largest = 2 ** (BITS_PER_BYTE * GAP_BYTES[chunk.index]) - 1
        numbers = aligned(index, GAP_DTYPES[chunk.index]).to(torch.int64) & largest
        is_value = numbers != largest
        places = ((numbers + is_value).cumsum(0) - 1)[is_value]
    if len(places) != chunk.num_changed:
        raise ValueError(f"its index names {len(places)} values, not {chunk.num_changed}")
    if int(places[-1]) >= num_values:
        raise ValueError(f"its index names value {int(places[-1])} of {num_values}")
    return places


@dataclass(frozen=True)
class NewValues:
    """What C values change to: `raw` bits where it says so, else so many `steps` on."""

    raw: torch.Tensor
    steps: torch.Tensor | None
    is_raw: torch.Tensor | None

    def of(self, old: torch.Tensor, chosen: torch.Tensor | slice) -> torch.Tensor:
        """The bits that the chosen values change to, which have the bits `old` now."""
        if self.steps is None or self.is_raw is None:
            return self.raw[chosen]
        return torch.where(self.is_raw[chosen], self.raw[chosen], old + self.steps[chosen])


def decode_values(chunk: Chunk, data: torch.Tensor, bits: torch.dtype) -> NewValues:
    """
    Raises:
        ValueError: there are more or fewer values than steps that do not fit.
    """
    values = data[chunk.index_bytes :]
    if chunk.values == "raw":
        return NewValues(aligned(values, bits), None, None)
    steps = values[: chunk.num_changed].view(torch.int8)
    is_raw = steps == ESCAPE
    escaped = aligned(values[chunk.num_changed :], bits)
    if int(is_raw.sum()) != len(escaped):
        raise ValueError(f"{int(is_raw.sum())} of its steps do not fit, and {len(escaped)} values are given for them")
    raw = torch.zeros(chunk.num_changed, dtype=bits, device=data.device)
    raw[is_raw] = escaped
    return NewValues(raw, steps.to(bits), is_raw)
