"""How the matrices of linear and expert layers are stored, and what multiplies by them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

# (x [T, D], weight [O, D], bias [O] or None) -> [T, O]
Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class WeightFormat:
    """Floating-point numbers as they are, in one dtype, which is also that of activations and results.

    Layers are given a format instead of a dtype: they make their weights here and take the product that goes with it.
    """

    dtype: torch.dtype
    device: torch.device

    def empty(self, *shape: int) -> nn.Parameter:
        """An uninitialised weight that is not trained."""
        return nn.Parameter(torch.empty(shape, dtype=self.dtype, device=self.device), requires_grad=False)

    def linear(self) -> Linear:
        """The fastest product for the device."""
        if self.device.type == "cpu":
            return F.linear
        # Triton comes with torch's CUDA builds alone.
        from .linear_triton import linear_triton  # noqa: PLC0415

        return linear_triton
