"""One tensor of a delta, and this rank's share of it: its values are found, summed up and changed where they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ...parallel.weights import Piece, ShardedWeight
from .checksum import BITS, checksum, place_factors
from .delta_codec import aligned, bits_of, decode_places, decode_values
from .delta_manifest import Chunk, DeltaPart
from .delta_source import Payload
from .manifest import DTYPE_BYTES
from .update_group import torch_dtype


@dataclass(frozen=True)
class BoundPart:
    """A part with the weight that it changes, and the place of its bytes."""

    part: DeltaPart
    weight: ShardedWeight
    payload: Payload
    begin: int
    chunk_values: int

    @property
    def name(self) -> str:
        return self.part.name

    def check_whole(self) -> None:
        """
        Raises:
            ValueError: its bytes are not the trainer's.
        """
        found = checksum(self._values())
        if found != self.part.checksum:
            raise ValueError(f"delta: {self.name}: its values have checksum {found}, not {self.part.checksum}")

    def load_whole(self) -> None:
        self.weight.load(self._values())

    def _values(self) -> torch.Tensor:
        data = self.payload.fetch(self.begin, self.part.num_bytes)
        return aligned(data, torch_dtype(self.part.dtype)).view(self.part.shape)

    def walk(self, *, write: bool) -> list[int]:
        """By how much the sum of each piece of this rank changes; with `write` the values change, too. In memory of a few
        times a chunk.

        Raises:
            OSError, ValueError: a chunk cannot be read, or does not say what it should.
        """
        totals = [0] * len(self.weight.pieces)
        begin = self.begin
        for number, chunk in enumerate(self.part.chunks):
            try:
                for place, moved in self._walk_chunk(chunk, begin, number * self.chunk_values, write=write):
                    totals[place] += moved
            except ValueError as error:
                raise ValueError(f"delta: {self.name}: chunk {number}: {error}") from None
            begin += chunk.num_bytes
        return totals

    def _walk_chunk(self, chunk: Chunk, begin: int, first: int, *, write: bool) -> Iterator[tuple[int, int]]:
        """Each piece that has values of a chunk, by number, with the change of its sum."""
        num_values = min(self.chunk_values, self.part.spec.num_values - first)
        touched = self._touched(first, first + num_values) if chunk.num_changed else []
        if not touched:
            return
        data = self.payload.fetch(begin, chunk.num_bytes).to(touched[0][1].storage.device)
        places = decode_places(chunk, data, num_values) + first
        values = decode_values(chunk, data, BITS[DTYPE_BYTES[self.part.dtype]])
        for number, piece in touched:
            chosen, bits, where = locate(places, piece, self.weight.shape)
            old = bits[where]
            new = values.of(old, chosen)
            moved = new.to(torch.int64) - old.to(torch.int64)
            if write:
                bits[where] = new
            yield number, int((moved * place_factors(places[chosen])).sum())

    def _touched(self, first: int, last: int) -> list[tuple[int, Piece]]:
        """This rank's pieces, by number, that have rows among the values `first` .. `last` - 1."""
        shape = self.weight.shape
        row_values = self.part.spec.num_values // shape[0] if shape else 1
        return [
            (number, piece)
            for number, piece in enumerate(self.weight.pieces)
            if not shape or (piece.index[0].start * row_values < last and piece.index[0].stop * row_values > first)
        ]


def locate(
    places: torch.Tensor, piece: Piece, shape: tuple[int, ...]
) -> tuple[torch.Tensor | slice, torch.Tensor, tuple[torch.Tensor, ...]]:
    """Which of some ascending flat indices lie in a piece of a tensor of `shape`; the piece's storage as bits, and the
    indices in it."""
    bits = bits_of(piece.storage)
    if not shape:
        return slice(None), bits.view(1), (places,)
    rows = piece.index[0]
    if bits.is_contiguous() and all(
        is_whole(part, size) for part, size in zip(piece.index[1:], shape[1:], strict=True)
    ):
        row_values = bits[0].numel()
        bounds = places.new_tensor([rows.start * row_values, rows.stop * row_values])
        first, last = torch.searchsorted(places, bounds).tolist()
        chosen = slice(first, last)
        return chosen, bits.view(-1), (places[chosen] - rows.start * row_values,)
    coordinates: list[torch.Tensor] = []
    for size in reversed(shape[1:]):
        coordinates.insert(0, places % size)
        places = places // size
    coordinates.insert(0, places)
    inside = torch.ones_like(places, dtype=torch.bool)
    for coordinate, part, size in zip(coordinates, piece.index, shape, strict=True):
        if not is_whole(part, size):
            inside &= (coordinate >= part.start) & (coordinate < part.stop)
    numbers = inside.nonzero().flatten()
    where = tuple(coordinate[numbers] - part.start for coordinate, part in zip(coordinates, piece.index, strict=True))
    return numbers, bits, where


def is_whole(part: slice, size: int) -> bool:
    return part.start == 0 and part.stop == size
