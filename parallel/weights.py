"""Where a layer's weights come from, which part of them a rank keeps, and what they are stored as.

A source is anything that can be sliced without being read whole: a tensor is one, a tensor in a file another. A layer says
of each tensor of a checkpoint which slices it keeps and where (`ShardedWeight`); loading, updating, reading back and
checksums all follow from that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch


class TensorSource(Protocol):
    """A tensor of a checkpoint; `torch.Tensor` is one. Indexing reads just the slice that is asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: Any) -> torch.Tensor: ...


class SafetensorsSlice(Protocol):
    """What safetensors' `get_slice` returns."""

    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str: ...

    def __getitem__(self, index: Any) -> torch.Tensor: ...


class SafetensorsSource:
    """A tensor in an open safetensors file."""

    def __init__(self, tensor: SafetensorsSlice) -> None:
        self._tensor = tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._tensor.get_shape())

    @property
    def dtype(self) -> str:
        """As safetensors names it, "BF16" for instance."""
        return self._tensor.get_dtype()

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._tensor[index]


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

    def load(self, source: TensorSource) -> None:
        """Fill the pieces from the unsharded tensor.

        Raises:
            ValueError: it has another shape; nothing was changed.
        """
        self.check(tuple(source.shape))
        for piece in self.pieces:
            piece.storage.copy_(source[piece.index])
