"""Checksums of tensors that add up over slices, so that the ranks of an engine and a trainer can compare what they hold
without anybody holding all of it.

A tensor's checksum is the sum over its values of hash(bits, flat index) modulo 2^64, where
hash(b, i) = (b + 1) * (i * GOLDEN + ODD), all in wrapping 64-bit integers.
"""

from __future__ import annotations

import math

import torch

GOLDEN = -7046029254386353131  # 2^64 / golden ratio, odd (Knuth, TAOCP 6.4), as a signed integer
ODD = 1442695040888963407
# Summed up at a time. On a CPU what is made of them stays in a core's cache; memory beyond it is taken anew each time.
BLOCK_VALUES = {"cpu": 1 << 16, "cuda": 1 << 22}
BLOCK_COLUMNS = 1 << 11
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum_piece(piece: torch.Tensor, index: tuple[slice, ...], shape: tuple[int, ...]) -> int:
    """The share of a piece, at `index` of an unsharded tensor of `shape`, as a signed 64-bit integer.

    The flat index of row r and column c (dim 0, and the other dims flattened) is r * stride + c, so sums over rows and over
    columns are all that is needed of the values.
    """
    if not shape:
        piece, index, shape = piece.view(1), (slice(0, 1),), (1,)
    columns = torch.zeros(1, dtype=torch.int64, device=piece.device)
    for part, size in zip(index[1:], shape[1:], strict=True):
        columns = (columns[:, None] * size + torch.arange(part.start, part.stop, device=piece.device)).flatten()
    rows = torch.arange(index[0].start, index[0].stop, device=piece.device) * math.prod(shape[1:]) * GOLDEN + ODD
    bits = piece.contiguous().view(BITS[piece.itemsize]).view(len(rows), len(columns))
    total = torch.zeros((), dtype=torch.int64, device=piece.device)
    block_values = BLOCK_VALUES[piece.device.type]
    columns_per_block = min(max(1, len(columns)), max(BLOCK_COLUMNS, block_values // max(1, len(rows))))
    rows_per_block = max(1, block_values // columns_per_block)
    for part, part_columns in zip(bits.split(columns_per_block, 1), columns.split(columns_per_block), strict=True):
        # One is added to every value.
        by_column = torch.full_like(part_columns, len(rows))
        for values, where in zip(part.split(rows_per_block), rows.split(rows_per_block), strict=True):
            values = values.to(torch.int64)
            total += ((values.sum(1) + len(part_columns)) * where).sum()
            by_column += values.sum(0)
        total += (by_column * (part_columns * GOLDEN)).sum()
    return int(total)


def place_factors(flat_index: torch.Tensor) -> torch.Tensor:
    """int64, by flat index: what one more in a value's bits adds to the checksum. So that of a tensor of which some values
    change follows from the one before."""
    return flat_index * GOLDEN + ODD


def checksum(tensor: torch.Tensor) -> str:
    """Of a whole tensor, as the engine reports it; cast it to the engine's dtype first."""
    index = tuple(slice(0, size) for size in tensor.shape)
    return render(checksum_piece(tensor, index, tuple(tensor.shape)))


def render(total: int) -> str:
    """16 hexadecimal digits of the sum modulo 2^64."""
    return f"{total & (2**64 - 1):016x}"
