"""Query and key norms over all heads together, whose width the tp ranks share.

Legend: T tokens, H query heads and G kv heads of this rank, d head width.
"""

from __future__ import annotations

import torch
from torch import nn

from ...parallel.collectives import all_reduce
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

    def forward(self, qkv: torch.Tensor) -> torch.Tensor:
        """[T, (H + 2 G) d] with queries and keys normed."""
        query, key, value = qkv.split([*self._sizes, qkv.shape[1] - sum(self._sizes)], dim=1)
        wide = [query.float(), key.float()]
        squares = all_reduce(torch.stack([x.pow(2).sum(-1) for x in wide], dim=1), self._axis)
        factors = torch.rsqrt(squares / self._counts + self._eps)
        parts = [
            weight * (x * factors[:, i : i + 1]).to(qkv.dtype)
            for i, (x, weight) in enumerate(zip(wide, (self.query, self.key), strict=True))
        ]
        return torch.cat([*parts, value], dim=1)
