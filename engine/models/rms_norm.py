"""Root-mean-square norm as a layer."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from ...parallel.partial_sum import PartialSum
from ...parallel.weights import ShardedWeight
from .model_context import ModelContext
from .norm_rope import select_layer_ops


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019) over the last dim, alone or of a sum. In models with wide norms the
    weight is in float32, whatever the model computes in."""

    def __init__(self, width: int, context: ModelContext, eps: float | None = None) -> None:
        """`eps`: None is the model's."""
        super().__init__()
        weight_format = context.weight_format
        if context.config.wide_norms:
            weight_format = replace(weight_format, dtype=torch.float32)
        self.weight = weight_format.empty(width)
        self._eps = context.config.rms_norm_eps if eps is None else eps
        self._ops = select_layer_ops(context.mesh.device)

    def sharded_weight(self) -> ShardedWeight:
        return ShardedWeight.of(tuple(self.weight.shape), self.weight.data)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._ops.rms_norm(hidden, self.weight, self._eps)

    def add(self, hidden: PartialSum, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of `hidden + residual`, and that sum, which may overwrite `residual`."""
        normed = hidden.add_rms_norm(residual, self.weight, self._eps)
        if normed is not None:
            return normed, residual
        # Terms may be in float32; their sum is rounded once.
        return self._ops.add_rms_norm(hidden.complete().to(residual.dtype), residual, self.weight, self._eps)
