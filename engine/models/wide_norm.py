"""Query and key norms over all heads together, whose width the tp ranks share.

Legend: T tokens, H query heads and G kv heads of this rank, d head width.
"""

from __future__ import annotations

import torch
from torch import nn

from ...parallel.collectives import all_reduce, sum_of_terms
from ...parallel.cpu_ops.library import parts_of
from ...parallel.cpu_ops.rms_norm import has_native_rms_norm, sums_of_squares_native
from ...parallel.linear import QKVParallelLinear
from .model_context import ModelContext


class WideNorms(nn.Module):
    """Root-mean-square norms of queries and of keys; the mean of squares is that of all ranks, in float32."""

    def __init__(self, context: ModelContext, qkv_proj: QKVParallelLinear, head_dim: int) -> None:
        super().__init__()
        self._sizes = [heads * head_dim for heads in (qkv_proj.num_local_heads, qkv_proj.num_local_kv_heads)]
        self.query, self.key = (context.weight_format.empty(size) for size in self._sizes)
        self._axis = context.axis
        self._eps = context.config.rms_norm_eps
        # Of ranks that hold the same kv heads each brings their squares.
        self._counts = torch.tensor(self._sizes, device=context.mesh.device) * context.axis.size
        num_holders = [context.axis.size, context.axis.size // qkv_proj.num_kv_replicas]
        self._num_parts = [parts_of(size, ranks) for size, ranks in zip(self._sizes, num_holders, strict=True)]
        self._has_native = context.mesh.device.type == "cpu" and has_native_rms_norm()

    def forward(self, qkv: torch.Tensor) -> torch.Tensor:
        """[T, (H + 2 G) d] with queries and keys normed."""
        query, key, value = qkv.split([*self._sizes, qkv.shape[1] - sum(self._sizes)], dim=1)
        sums = [self._squares(x, parts) for x, parts in zip((query, key), self._num_parts, strict=True)]
        squares = all_reduce(torch.stack(sums, dim=1), self._axis)
        factors = torch.rsqrt(squares / self._counts + self._eps)
        parts = [
            weight * (x.float() * factors[:, i : i + 1]).to(qkv.dtype)
            for i, (x, weight) in enumerate(((query, self.query), (key, self.key)))
        ]
        return torch.cat([*parts, value], dim=1)

    def _squares(self, x: torch.Tensor, num_parts: int) -> torch.Tensor:
        """This rank's sum of every row: [T]. In bfloat16 on a CPU as a tree of parts, those of all ranks together."""
        if not self._has_native or x.dtype != torch.bfloat16:
            return x.float().pow(2).sum(-1)
        return sum_of_terms(sums_of_squares_native(x, num_parts).t())
