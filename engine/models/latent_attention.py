"""Multi-head latent attention (MLA, DeepSeek-V2 2024), sharded by heads.

What a token leaves behind is a latent, of which every head's keys and values are made, and one rotated key for all heads.
They do not depend on heads, so every tp rank keeps the whole of them. The arithmetic is that of `transformers`'
DeepseekV3Attention: its form, in which latents are expanded, for prefills; decodes are absorbed into the latents, see
`LatentProjection`.

Legend: T tokens of a step, D hidden, H heads of this rank, L width of a latent, R width of the rotated key, N width of a
head's other key columns, V width of a head's values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...parallel.cpu_ops.heads import absorb_native, extract_native, has_native_heads
from ...parallel.linear import MergedColumnParallelLinear, RowParallelLinear, shard_size
from ...parallel.weights import ShardedWeight
from ..attention.backend import AttentionBackend, AttentionRule, CachedTensors
from ..kv_cache.kv_store import KVTensorSpec
from .forward_batch import ForwardBatch
from .model_config import LatentConfig
from .model_context import ModelContext
from .norm_rope import LatentNorm, select_layer_ops
from .rms_norm import RMSNorm

# Of the norms of latents, whatever `rms_norm_eps` says.
LATENT_NORM_EPS = 1e-6


class ExpandedHeads(nn.Module):
    """`kv_b_proj`, a `LatentProjection`: keys and values of this rank's heads, [H * (N + V), L]."""

    def __init__(self, shape: LatentConfig, context: ModelContext) -> None:
        super().__init__()
        self.key_width, self.value_width = shape.qk_nope_head_dim, shape.v_head_dim
        self._width = self.key_width + self.value_width
        self.proj = MergedColumnParallelLinear(
            shape.kv_lora_rank, [shape.num_heads * self._width], context.axis, weight_format=context.weight_format
        )

    def expand(self, latent: torch.Tensor, heads: slice) -> tuple[torch.Tensor, torch.Tensor]:
        rows = slice(heads.start * self._width, heads.stop * self._width)
        both = self.proj.matrix.product_of_rows(latent, rows).view(len(latent), -1, self._width)
        return both[..., : self.key_width], both[..., self.key_width :]

    def absorb(self, query: torch.Tensor) -> torch.Tensor:
        keys = self.proj.matrix.rows_of_heads(self._width, slice(0, self.key_width))
        if has_native_heads(query):
            return absorb_native(query, keys)
        return torch.bmm(query.transpose(0, 1), keys).transpose(0, 1)

    def extract(self, attended: torch.Tensor) -> torch.Tensor:
        values = self.proj.matrix.rows_of_heads(self._width, slice(self.key_width, self._width))
        if has_native_heads(attended):
            return extract_native(attended, values)
        return torch.bmm(attended.transpose(0, 1), values.transpose(1, 2)).transpose(0, 1)


class LatentAttention(nn.Module):
    """Heads of this rank. Queries come of a latent of their own where `q_lora_rank` says so."""

    def __init__(self, _layer_id: int, context: ModelContext) -> None:
        super().__init__()
        config, shape, weight_format = context.config, context.config.attention, context.weight_format
        assert isinstance(shape, LatentConfig)
        self.shape = shape
        self.num_local_heads = shard_size(shape.num_heads, context.axis, "num_heads")
        self._cached_width = shape.kv_lora_rank + shape.qk_rope_head_dim
        query_width = shape.num_heads * shape.qk_head_dim
        # Queries, or latents of them, and latents of keys and values, in one product; latents are the same on all ranks.
        self.first_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [query_width if shape.q_lora_rank is None else shape.q_lora_rank, self._cached_width],
            context.axis,
            bias=shape.bias,
            replicated=(1,) if shape.q_lora_rank is None else (0, 1),
            weight_format=weight_format,
        )
        self.q_norm, self.q_proj = None, None
        if shape.q_lora_rank is None:
            if self.first_proj.bias is not None:
                # Queries have none.
                self.first_proj.bias.data.zero_()
        else:
            self.q_norm = RMSNorm(shape.q_lora_rank, context, LATENT_NORM_EPS)
            self.q_proj = MergedColumnParallelLinear(
                shape.q_lora_rank, [query_width], context.axis, weight_format=weight_format
            )
        self.kv_norm = RMSNorm(shape.kv_lora_rank, context, LATENT_NORM_EPS)
        self.heads = ExpandedHeads(shape, context)
        self.o_proj = RowParallelLinear(
            shape.num_heads * shape.v_head_dim,
            config.hidden_size,
            context.axis,
            bias=shape.bias,
            weight_format=weight_format,
        )
        self._rule = AttentionRule(shape.scale)
        self._norm = LatentNorm(self.kv_norm.weight, LATENT_NORM_EPS, shape.rope_interleave)
        self._ops = select_layer_ops(context.mesh.device)

    def forward(
        self,
        hidden: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        batch: ForwardBatch[Any],
        backend: AttentionBackend[Any],
        kv: CachedTensors,
    ) -> torch.Tensor:
        """[T, D] -> partial sums [T, D]; writes this step's latents to their slots first."""
        query, compressed = self.first_proj(hidden).tensor_split([-self._cached_width], dim=-1)
        if self.q_norm is not None and self.q_proj is not None:
            query = self.q_proj(self.q_norm(query))
        query = query.unflatten(-1, (-1, self.shape.qk_head_dim))
        query = self._ops.latent_rope_store(query, compressed, self._norm, rope, batch.kv_slots, kv["latent"])
        out = backend.forward_latent(query, kv, batch.attention_plan, self._rule, self.heads)
        return self.o_proj(out.flatten(1))

    def sharded_weights(self, layer: str) -> dict[str, ShardedWeight]:
        prefix = f"{layer}.self_attn"
        weights = {
            f"{prefix}.kv_a_layernorm.weight": self.kv_norm.sharded_weight(),
            f"{prefix}.kv_b_proj.weight": self.heads.proj.sharded_weight(part=0),
            f"{prefix}.o_proj.weight": self.o_proj.sharded_weight(),
        }
        if self.q_norm is not None and self.q_proj is not None:
            weights[f"{prefix}.q_a_layernorm.weight"] = self.q_norm.sharded_weight()
            weights[f"{prefix}.q_b_proj.weight"] = self.q_proj.sharded_weight(part=0)
        first = "q_proj" if self.q_proj is None else "q_a_proj"
        for part, name in enumerate((first, "kv_a_proj_with_mqa")):
            weights[f"{prefix}.{name}.weight"] = self.first_proj.sharded_weight(part)
            if self.shape.bias and name != "q_proj":
                weights[f"{prefix}.{name}.bias"] = self.first_proj.sharded_bias(part)
        if self.shape.bias:
            weights[f"{prefix}.o_proj.bias"] = self.o_proj.sharded_bias()
        return weights

    @property
    def output_shape(self) -> tuple[int, int]:
        """What attention gives for one token: heads of this rank and their width."""
        return self.num_local_heads, self.shape.v_head_dim

    def kv_specs(self, dtype: torch.dtype) -> list[KVTensorSpec]:
        """A latent and the rotated key behind it, for all heads."""
        return [KVTensorSpec("latent", (self.shape.kv_lora_rank + self.shape.qk_rope_head_dim,), dtype)]
