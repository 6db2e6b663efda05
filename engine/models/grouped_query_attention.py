"""Grouped-query attention (Ainslie et al. 2023), sharded by heads, with what families add to it.

Legend: T tokens of a step, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...parallel.linear import QKVParallelLinear, RowParallelLinear
from ...parallel.weights import ShardedWeight
from ..attention.backend import AttentionBackend, AttentionRule, CachedTensors
from ..kv_cache.kv_store import KVTensorSpec
from .forward_batch import ForwardBatch
from .model_config import GroupedQueryConfig
from .model_context import ModelContext
from .norm_rope import HeadNorms, KVTarget, select_layer_ops
from .rms_norm import RMSNorm
from .wide_norm import WideNorms


class GroupedQueryAttention(nn.Module):
    """Heads of this rank, queries and keys normed as the configuration says, and rotated; keys and values go to pages."""

    def __init__(self, layer_id: int, context: ModelContext) -> None:
        super().__init__()
        config, shape = context.config, context.config.attention
        assert isinstance(shape, GroupedQueryConfig)
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            shape.head_dim,
            shape.num_heads,
            shape.num_kv_heads,
            context.axis,
            bias=shape.qkv_bias,
            weight_format=context.weight_format,
        )
        self.o_proj = RowParallelLinear(
            shape.num_heads * shape.head_dim,
            config.hidden_size,
            context.axis,
            bias=shape.output_bias,
            weight_format=context.weight_format,
        )
        self.q_norm, self.k_norm, self._head_norms = None, None, None
        if shape.norms == "head":
            self.q_norm, self.k_norm = (RMSNorm(shape.head_dim, context) for _ in range(2))
            self._head_norms = HeadNorms(self.q_norm.weight, self.k_norm.weight, config.rms_norm_eps)
        self.wide_norms = WideNorms(context, self.qkv_proj, shape.head_dim) if shape.norms == "width" else None
        self._clip = shape.clip
        self._ops = select_layer_ops(context.mesh.device)
        self._head_dim = shape.head_dim
        self.sinks = context.weight_format.empty(self.qkv_proj.num_local_heads) if shape.sinks else None
        self._sinks_of_all = (shape.num_heads, context.axis.rank * self.qkv_proj.num_local_heads)
        self._rule = AttentionRule(shape.head_dim**-0.5, shape.windows[layer_id], self.sinks)

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
        if self.wide_norms is not None:
            qkv = self.wide_norms(qkv)
        if self._clip is not None:
            qkv = qkv.clamp(-self._clip, self._clip)
        query = self._ops.norm_rope_store(qkv, self._head_norms, rope, KVTarget(batch.kv_slots, kv["k"], kv["v"]))
        out = backend.forward(query, kv, batch.attention_plan, self._rule)
        return self.o_proj(out.flatten(1))

    def sharded_weights(self, layer: str) -> dict[str, ShardedWeight]:
        prefix = f"{layer}.self_attn"
        weights = {f"{prefix}.o_proj.weight": self.o_proj.sharded_weight(), **self._norm_weights(prefix)}
        for part in ("q", "k", "v"):
            weights[f"{prefix}.{part}_proj.weight"] = self.qkv_proj.sharded_weight(part)
            if self.qkv_proj.bias is not None:
                weights[f"{prefix}.{part}_proj.bias"] = self.qkv_proj.sharded_bias(part)
        if self.sinks is not None:
            num_heads, first = self._sinks_of_all
            weights[f"{prefix}.sinks"] = ShardedWeight.of((num_heads,), self.sinks.data, first=first)
        if self.o_proj.bias is not None:
            weights[f"{prefix}.o_proj.bias"] = self.o_proj.sharded_bias()
        return weights

    def _norm_weights(self, prefix: str) -> dict[str, ShardedWeight]:
        query, key = f"{prefix}.q_norm.weight", f"{prefix}.k_norm.weight"
        if self.q_norm is not None and self.k_norm is not None:
            return {query: self.q_norm.sharded_weight(), key: self.k_norm.sharded_weight()}
        if self.wide_norms is not None:
            return {
                query: self.qkv_proj.sharded_vector("q", self.wide_norms.query.data),
                key: self.qkv_proj.sharded_vector("k", self.wide_norms.key.data),
            }
        return {}

    @property
    def output_shape(self) -> tuple[int, int]:
        """What attention gives for one token: heads of this rank and their width."""
        return self.qkv_proj.num_local_heads, self._head_dim

    def kv_specs(self, dtype: torch.dtype) -> list[KVTensorSpec]:
        """Keys and values of this rank's heads."""
        width = (self.qkv_proj.num_local_kv_heads, self._head_dim)
        return [KVTensorSpec(name, width, dtype) for name in ("k", "v")]
