"""Where a layer's weights come from, which part of them a rank keeps, and what they are stored as.

A layer says of each tensor of a checkpoint which slices it keeps and where (`ShardedWeight`); loading, updating, reading
back and checksums all follow from that. A source is anything that has the slices: a tensor is one. Files are read by
their own plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class TensorSource(Protocol):
    """A tensor of a checkpoint; `torch.Tensor` is one. Indexing gives just the slice that is asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: Any) -> torch.Tensor: ...


@dataclass(frozen=True)
class Piece:
    """A part of an unsharded tensor on this rank: its slice of every dim, and the storage of it, a view."""

    index: tuple[slice, ...]
    storage: torch.Tensor


@dataclass(frozen=True)
class ShardedWeight:
    """A tensor as a checkpoint has it, by its unsharded shape, and the pieces of it that this rank keeps; other ranks may
    keep the same ones."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @staticmethod
    def of(shape: tuple[int, ...], storage: torch.Tensor, dim: int = 0, first: int = 0) -> ShardedWeight:
        """One piece, which begins at `first` of dim `dim` and is whole in the others; an empty one is none."""
        index = tuple(
            slice(first, first + storage.shape[dim]) if d == dim else slice(0, size) for d, size in enumerate(shape)
        )
        return ShardedWeight(shape, (Piece(index, storage),) if storage.numel() else ())

    def check(self, shape: tuple[int, ...]) -> None:
        """
        Raises:
            ValueError: the shape is not that of the unsharded tensor.
        """
        if tuple(shape) != self.shape:
            raise ValueError(f"shape {tuple(shape)}: must be {self.shape}")

    def check_stored(self, shape: tuple[int, ...]) -> None:
        """As `check`, of a tensor in a checkpoint's file.

        Raises:
            ValueError: the tensor cannot be had from what has that shape.
        """
        self.check(shape)

    def stored_pieces(self, shape: tuple[int, ...]) -> tuple[Piece, ...]:
        """This rank's pieces of a tensor that a checkpoint's file has in that shape, which was checked."""
        return self.pieces

    def check_dtype(self, dtype: torch.dtype) -> None:
        """
        Raises:
            ValueError: numbers of this dtype mean nothing without a scale that the model has no place for.
        """
        if dtype not in FLOAT_DTYPES:
            names = ", ".join(str(each).removeprefix("torch.") for each in FLOAT_DTYPES)
            raise ValueError(f"dtype {str(dtype).removeprefix('torch.')}: must be one of {names}")

    def load(self, source: TensorSource) -> None:
        """Fill the pieces from the unsharded tensor.

        Raises:
            ValueError: it has another shape; nothing was changed.
        """
        self.check(tuple(source.shape))
        for piece in self.pieces:
            piece.storage.copy_(source[piece.index])


@dataclass(frozen=True)
class TransposableWeight(ShardedWeight):
    """A stack of matrices [E, R, C] that a checkpoint may have transposed, [E, C, R]. What has the stack's own shape is
    not turned, as in `transformers`."""

    def check_stored(self, shape: tuple[int, ...]) -> None:
        if tuple(shape) not in (self.shape, self._transposed):
            raise ValueError(f"shape {tuple(shape)}: must be {self.shape}, or {self._transposed} for the transpose")

    def stored_pieces(self, shape: tuple[int, ...]) -> tuple[Piece, ...]:
        if tuple(shape) == self.shape:
            return self.pieces
        return tuple(
            Piece((stack, columns, rows), piece.storage.transpose(1, 2))
            for piece in self.pieces
            for stack, rows, columns in [piece.index]
        )

    @property
    def _transposed(self) -> tuple[int, ...]:
        num_matrices, num_rows, num_columns = self.shape
        return num_matrices, num_columns, num_rows
