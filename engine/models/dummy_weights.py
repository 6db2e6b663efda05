"""Random weights in place of a checkpoint's (`load_format="dummy"`): made where they are used, so that a model of any size
starts within seconds, for measurements and for trainers that send the weights anyway.

A tensor's values depend on its name, shape, dtype and kind of device alone: every rank makes those that it keeps, in any
layout, and ranks that keep the same ones have the same values.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

import torch

from ...parallel.fp8 import scale_names
from ...parallel.weights import ShardedWeight


class RandomSource:
    """A tensor of a checkpoint that nobody has written. Norms are ones and biases zeros; matrices keep the variance of
    their input, so that activations stay finite at any depth."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._name = name
        self.shape = shape
        self._dtype = dtype
        self._device = device

    def __getitem__(self, index: Any) -> torch.Tensor:
        values = torch.empty(self.shape, dtype=self._dtype, device=self._device)
        if self._name.endswith(".bias"):
            return values.zero_()[index]
        if len(self.shape) == 1:
            return values.fill_(1.0)[index]
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(self._name.encode()))
        return values.normal_(std=1 / math.sqrt(self.shape[-1]), generator=generator)[index]


def fill_with_random_values(weights: Mapping[str, ShardedWeight], dtype: torch.dtype, device: torch.device) -> None:
    """Fill every parameter, by its tensors' names in a checkpoint. Scales come of what they belong to."""
    scales = set(scale_names(weights).values())
    for name, weight in weights.items():
        if name not in scales:
            weight.load(RandomSource(name, weight.shape, dtype, device))
