"""Reading weights back: the first rows of a tensor, and checksums, put together from what the ranks hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
import torch

from ...parallel.weights import Piece, ShardedWeight
from .checksum import checksum_piece, render

Bounds = list[tuple[int, int]]


class RowsPart(msgspec.Struct, frozen=True, array_like=True):
    """A piece of the rows asked for: bounds of every dim, and float32 values in C order."""

    bounds: Bounds
    values: bytes


def bounds_of(piece: Piece) -> Bounds:
    return [(part.start, part.stop) for part in piece.index]


def first_rows(weight: ShardedWeight, num_rows: int) -> bytes:
    """This rank's part of the first rows (dim 0) of an unsharded tensor, encoded."""
    parts = []
    for piece in weight.pieces:
        bounds = bounds_of(piece)
        first, last = bounds[0]
        if first < num_rows:
            bounds[0] = (first, min(last, num_rows))
            # A copy: storage that numpy has seen can no longer be released.
            values = piece.storage[: bounds[0][1] - first].to("cpu", torch.float32, copy=True).contiguous().numpy()
            parts.append(RowsPart(bounds, values.tobytes()))
    return msgspec.msgpack.encode(parts)


def join_rows(payloads: Sequence[bytes], shape: tuple[int, ...], num_rows: int) -> np.ndarray:
    """The rows [min(num_rows, shape[0]), ...] float32, from all ranks' parts."""
    rows = np.full((min(num_rows, shape[0]), *shape[1:]), np.nan, dtype=np.float32)
    for payload in payloads:
        for part in msgspec.msgpack.decode(payload, type=list[RowsPart]):
            sizes = [last - first for first, last in part.bounds]
            where = tuple(slice(first, last) for first, last in part.bounds)
            rows[where] = np.frombuffer(part.values, dtype=np.float32).reshape(sizes)
    return rows


def piece_checksums(weights: Mapping[str, ShardedWeight]) -> bytes:
    """This rank's pieces with their checksums, encoded."""
    found = {
        name: [(bounds_of(piece), checksum_piece(piece.storage, piece.index, weight.shape)) for piece in weight.pieces]
        for name, weight in weights.items()
    }
    return msgspec.msgpack.encode(found)


def join_checksums(payloads: Sequence[bytes], weights: Mapping[str, ShardedWeight]) -> dict[str, str]:
    """A checksum for every tensor, from all ranks' pieces; those that several ranks hold count once.

    Raises:
        ValueError: ranks that hold the same piece disagree, or a part of a tensor is with nobody.
    """
    decoder = msgspec.msgpack.Decoder(dict[str, list[tuple[Bounds, int]]])
    joined: dict[str, dict[tuple[tuple[int, int], ...], int]] = {name: {} for name in weights}
    for rank, payload in enumerate(payloads):
        for name, pieces in decoder.decode(payload).items():
            for bounds, value in pieces:
                if joined[name].setdefault(tuple(bounds), value) != value:
                    raise ValueError(f"rank {rank} and another hold different values of {name} {bounds}")
    for name, found in joined.items():
        num_values = sum(math.prod(last - first for first, last in bounds) for bounds in found)
        if num_values != math.prod(weights[name].shape):
            raise ValueError(f"{name}: {num_values} of {math.prod(weights[name].shape)} values are held by the ranks")
    return {name: render(sum(found.values())) for name, found in joined.items()}
