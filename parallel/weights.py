"""Where a layer's weights come from and what they are stored as.

A source is anything that can be sliced without being read whole: a tensor is one, a tensor in a file another. This file
does not know which slice a layer wants.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn


class TensorSource(Protocol):
    """A tensor of a checkpoint; `torch.Tensor` is one. Indexing reads just the slice that is asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: Any) -> torch.Tensor: ...


class SafetensorsSlice(Protocol):
    """What safetensors' `get_slice` returns."""

    def get_shape(self) -> list[int]: ...

    def __getitem__(self, index: Any) -> torch.Tensor: ...


class SafetensorsSource:
    """A tensor in an open safetensors file."""

    def __init__(self, tensor: SafetensorsSlice) -> None:
        self._tensor = tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._tensor.get_shape())

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._tensor[index]


def empty_weight(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """An uninitialised weight that is not trained. Every sharded weight is made here, so the format has one place."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


def check_shape(source: TensorSource, expected: tuple[int, ...]) -> None:
    """Refuse a tensor that is not the layer's.

    Raises:
        ValueError: the source has another shape than the layer's unsharded weight.
    """
    if tuple(source.shape) != expected:
        raise ValueError(f"shape {tuple(source.shape)}: must be {expected}")
