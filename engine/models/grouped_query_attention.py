"""Grouped-query attention (Ainslie et al. 2023) with query and key norms, sharded by heads.

Legend: T tokens of a step, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...parallel.linear import QKVParallelLinear, RowParallelLinear
from ...parallel.weights import ShardedWeight
from ..attention.backend import AttentionBackend, CachedTensors
from ..kv_cache.kv_store import KVTensorSpec
from .forward_batch import ForwardBatch
from .model_context import ModelContext
from .norm_rope import HeadNorms, select_layer_ops
from .rms_norm import RMSNorm


class GroupedQueryAttention(nn.Module):
    """Heads of this rank, queries and keys normed per head and rotated; keys and values go to pages."""

    def __init__(self, context: ModelContext) -> None:
        super().__init__()
        config, shape = context.config, context.config.attention
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            shape.head_dim,
            shape.num_heads,
            shape.num_kv_heads,
            context.axis,
            bias=shape.bias,
            weight_format=context.weight_format,
        )
        self.o_proj = RowParallelLinear(
            shape.num_heads * shape.head_dim,
            config.hidden_size,
            context.axis,
            bias=shape.bias,
            weight_format=context.weight_format,
        )
        self.q_norm = RMSNorm(shape.head_dim, context)
        self.k_norm = RMSNorm(shape.head_dim, context)
        self._norms = HeadNorms(self.q_norm.weight, self.k_norm.weight, config.rms_norm_eps)
        self._ops = select_layer_ops(context.mesh.device)
        self._head_dim = shape.head_dim
        self._scale = shape.head_dim**-0.5

    def forward(
        self,
        hidden: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        batch: ForwardBatch[Any],
        backend: AttentionBackend[Any],
        kv: CachedTensors,
    ) -> torch.Tensor:
        """[T, D] -> partial sums [T, D]; writes this step's keys and values to their slots first."""
        qkv = self.qkv_proj(hidden)
        query = self._ops.norm_rope_store(qkv, self._norms, rope, batch.kv_slots, kv["k"], kv["v"])
        out = backend.forward(query, kv, batch.attention_plan, self._scale)
        return self.o_proj(out.flatten(1))

    def sharded_weights(self, prefix: str) -> dict[str, ShardedWeight]:
        weights = {
            f"{prefix}.o_proj.weight": self.o_proj.sharded_weight(),
            f"{prefix}.q_norm.weight": self.q_norm.sharded_weight(),
            f"{prefix}.k_norm.weight": self.k_norm.sharded_weight(),
        }
        for part in ("q", "k", "v"):
            weights[f"{prefix}.{part}_proj.weight"] = self.qkv_proj.sharded_weight(part)
            if self.qkv_proj.bias is not None:
                weights[f"{prefix}.{part}_proj.bias"] = self.qkv_proj.sharded_bias(part)
        if self.o_proj.bias is not None:
            weights[f"{prefix}.o_proj.bias"] = self.o_proj.sharded_bias()
        return weights

    @property
    def output_shape(self) -> tuple[int, int]:
        """What attention gives for one token: heads of this rank and their width."""
        return self.qkv_proj.num_local_heads, self._head_dim

    def kv_specs(self, dtype: torch.dtype) -> list[KVTensorSpec]:
        """Keys and values of this rank's heads."""
        width = (self.qkv_proj.num_local_kv_heads, self._head_dim)
        return [KVTensorSpec(name, width, dtype) for name in ("k", "v")]
