"""Where a layer's weights come from: anything that can be sliced without being read whole."""

from __future__ import annotations

from typing import Any, Protocol

import torch


class TensorSource(Protocol):
    """A tensor of a checkpoint. Indexing reads just the slice that is asked for."""

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


def check_shape(source: TensorSource, expected: tuple[int, ...]) -> None:
    """
    Raises:
        ValueError: the source has another shape than the layer's unsharded weight.
    """
    if tuple(source.shape) != expected:
        raise ValueError(f"shape {tuple(source.shape)}: must be {expected}")
