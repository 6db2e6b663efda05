"""Checksums of tensors that add up over slices, so that the ranks of an engine and a trainer can compare what they hold
without anybody holding all of it.

A tensor's checksum is the sum over its values of hash(bits, flat index) modulo 2^64, where
hash(b, i) = (b + 1) * (i * GOLDEN + ODD), all in wrapping 64-bit integers.
"""

from __future__ import annotations

import torch

GOLDEN = -7046029254386353131  # 2^64 / golden ratio, odd (Knuth, TAOCP 6.4), as a signed integer
ODD = 1442695040888963407
BLOCK_VALUES = 1 << 22
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum_piece(piece: torch.Tensor, index: tuple[slice, ...], shape: tuple[int, ...]) -> int:
    """The share of a piece, at `index` of an unsharded tensor of `shape`, as a signed 64-bit integer."""
    positions = torch.zeros(1, dtype=torch.int64, device=piece.device)
    for part, size in zip(index, shape, strict=True):
        along = torch.arange(part.start, part.stop, device=piece.device)
        positions = (positions[:, None] * size + along[None, :]).flatten()
    bits = piece.contiguous().view(BITS[piece.itemsize]).flatten()
    total = torch.zeros((), dtype=torch.int64, device=piece.device)
    for values, where in zip(bits.split(BLOCK_VALUES), positions.split(BLOCK_VALUES), strict=True):
        total += ((values.to(torch.int64) + 1) * (where * GOLDEN + ODD)).sum()
    return int(total)


def checksum(tensor: torch.Tensor) -> str:
    """Of a whole tensor, as the engine reports it; cast it to the engine's dtype first."""
    index = tuple(slice(0, size) for size in tensor.shape)
    return render(checksum_piece(tensor, index, tuple(tensor.shape)))


def render(total: int) -> str:
    """16 hex digits of the sum modulo 2^64."""
    return f"{total & (2**64 - 1):016x}"
