"""Which bytes of a file a rank needs, as few large reads.

A piece of a tensor is cut into blocks: whole rows as the file has them, with what to keep of each. Where a rank keeps some
columns of short rows it reads all columns: the disk and the page cache bring them anyway. Blocks that are neighbours, or
nearly, are read together.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache

import torch

from ...parallel.weights import Piece

# A read begins this far from a multiple of it in memory as in the file: so tensors are aligned as there.
ALIGNMENT = 64
# A read brings at most this much: enough for a disk, and little memory for a thread, 8 MiB; the allocator of pinned memory
# would double it if it was more.
MAX_READ_BYTES = (8 << 20) - ALIGNMENT
# Longer rows of which a rank keeps a part are read one by one, that part alone.
LONG_ROW_BYTES = 1 << 20
# Bytes between two blocks that nobody needs, and which still cost less than another read.
MAX_GAP_BYTES = 64 << 10
# A smaller block takes longer to be read alone than to be copied once more.
MIN_DIRECT_BYTES = 128 << 10


@dataclass(slots=True)
class Block:
    """Rows of a tensor, one behind the other in the file from `begin` on, and where a part of them goes: the values
    from the `first`-th on, `strides` apart, as many as the storage's shape says."""

    begin: int
    num_bytes: int
    dtype: torch.dtype
    first: int
    strides: tuple[int, ...]
    storage: torch.Tensor

    @property
    def end(self) -> int:
        return self.begin + self.num_bytes

    @property
    def can_be_read_in_place(self) -> bool:
        """Whether the file's bytes are the storage's as they are, and enough of them that it pays."""
        return (
            self.num_bytes >= MIN_DIRECT_BYTES
            and self.storage.is_cpu
            and self.storage.dtype == self.dtype
            and self.storage.nbytes == self.num_bytes
            and self.storage.is_contiguous()
        )


@dataclass(slots=True)
class Read:
    """Bytes of a file that are read at once. In place: there is one block, whose storage they are read to."""

    begin: int
    end: int
    in_place: bool
    blocks: list[Block] = field(default_factory=list)


def cut(begin: int, dtype: torch.dtype, shape: tuple[int, ...], piece: Piece) -> Iterator[Block]:
    """The blocks of a piece of a tensor that has `shape` and stands at `begin`."""
    if not shape:
        yield Block(begin, dtype.itemsize, dtype, 0, (), piece.storage)
        return
    strides = contiguous_strides(shape)
    rows, inner = piece.index[0], piece.index[1:]
    row_bytes = strides[0] * dtype.itemsize
    begin += rows.start * row_bytes
    num_rows = rows.stop - rows.start
    first, is_whole = 0, True
    for part, size, stride in zip(inner, shape[1:], strides[1:], strict=True):
        first += part.start * stride
        is_whole = is_whole and part.stop - part.start == size
    if row_bytes > (MAX_READ_BYTES if is_whole else LONG_ROW_BYTES):
        for row in range(num_rows):
            yield from cut(begin + row * row_bytes, dtype, shape[1:], Piece(inner, piece.storage[row]))
    elif num_rows * row_bytes <= MAX_READ_BYTES:
        yield Block(begin, num_rows * row_bytes, dtype, first, strides, piece.storage)
    else:
        for part in piece.storage.split(MAX_READ_BYTES // row_bytes):
            yield Block(begin, len(part) * row_bytes, dtype, first, strides, part)
            begin += len(part) * row_bytes


@cache
def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A model has tens of thousands of tensors and few shapes."""
    return tuple(itertools.accumulate(shape[:0:-1], operator.mul, initial=1))[::-1]


def plan_reads(blocks: Iterable[Block]) -> list[Read]:
    """Reads that bring all blocks of one file, in its order."""
    reads: list[Read] = []
    last: Read | None = None
    for block in sorted(blocks, key=lambda block: block.begin):
        if block.can_be_read_in_place:
            reads.append(Read(block.begin, block.end, True, [block]))
            last = None
        elif last is None or block.begin > last.end + MAX_GAP_BYTES or block.end > last.begin + MAX_READ_BYTES:
            last = Read(block.begin, block.end, False, [block])
            reads.append(last)
        else:
            last.end = max(last.end, block.end)
            last.blocks.append(block)
    return reads
