"""Qwen3-MoE (Qwen Team 2025): GQA with per-head query/key norms, rotary positions, top-k softmax routing.

The arithmetic is that of `transformers`' Qwen3MoeForCausalLM, operation by operation, so that greedy tokens and routes
agree with it; what differs is where weights live (sharded over `tp`) and that keys and values go to pages.

Legend: P rows that this rank holds between the layers, D hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...parallel.embedding import ParallelLMHead, VocabParallelEmbedding
from ...parallel.moe.layer import MoeLayer, RouteRecorder
from ...parallel.partial_sum import PartialSum
from ...parallel.weights import ShardedWeight
from ..attention.backend import AttentionBackend, CachedTensors
from ..kv_cache.kv_store import KVStore, KVTensorSpec
from .causal_lm import FusedWeight
from .dense_mlp import DenseMLP
from .forward_batch import ForwardBatch
from .grouped_query_attention import GroupedQueryAttention
from .model_config import AttentionConfig, ModelConfig, MoeConfig, eos_ids, resolve_dtype
from .model_context import ModelContext
from .moe_block import fused_moe_weights, make_moe_layer, moe_weights
from .rms_norm import RMSNorm
from .rotary import RotaryEmbedding, parse_rope

if TYPE_CHECKING:
    from transformers import Qwen3MoeConfig


def parse_config(hf_config: Qwen3MoeConfig, model_path: str, dtype: str) -> ModelConfig:
    """The engine's view of a checkpoint's configuration.

    Raises:
        ValueError: the checkpoint asks for something that this model file does not compute.
    """
    if hf_config.sliding_window is not None:
        raise ValueError("sliding_window: must be null; sliding-window attention is not supported")
    if hf_config.hidden_act != "silu":
        raise ValueError(f"hidden_act={hf_config.hidden_act!r}: must be 'silu'")
    num_layers = hf_config.num_hidden_layers
    moe_layer_ids = tuple(
        layer
        for layer in range(num_layers)
        if layer not in hf_config.mlp_only_layers and (layer + 1) % hf_config.decoder_sparse_step == 0
    )
    if not moe_layer_ids or hf_config.num_experts == 0:
        raise ValueError(
            "the checkpoint has no MoE layer: decoder_sparse_step, mlp_only_layers or num_experts exclude all"
        )
    return ModelConfig(
        model_type=hf_config.model_type,
        vocab_size=hf_config.vocab_size,
        hidden_size=hf_config.hidden_size,
        num_layers=num_layers,
        attention=AttentionConfig(
            num_heads=hf_config.num_attention_heads,
            num_kv_heads=hf_config.num_key_value_heads,
            head_dim=hf_config.head_dim,
            bias=hf_config.attention_bias,
            rope=parse_rope(hf_config),
        ),
        moe=MoeConfig(
            layer_ids=moe_layer_ids,
            num_experts=hf_config.num_experts,
            top_k=hf_config.num_experts_per_tok,
            norm_topk_prob=hf_config.norm_topk_prob,
            intermediate_size=hf_config.moe_intermediate_size,
        ),
        intermediate_size=hf_config.intermediate_size,
        rms_norm_eps=hf_config.rms_norm_eps,
        tie_word_embeddings=hf_config.tie_word_embeddings,
        max_position_embeddings=hf_config.max_position_embeddings,
        eos_token_ids=eos_ids(model_path, hf_config.eos_token_id),
        dtype_name=resolve_dtype(dtype, hf_config.dtype),
    )


class DecoderLayer(nn.Module):
    def __init__(self, layer_id: int, context: ModelContext) -> None:
        super().__init__()
        config = context.config
        self.self_attn = GroupedQueryAttention(context)
        self.mlp: MoeLayer | DenseMLP = (
            make_moe_layer(config.moe.layer_ids.index(layer_id), context)
            if layer_id in config.moe.layer_ids
            else DenseMLP(context)
        )
        self.input_layernorm = RMSNorm(config.hidden_size, context)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, context)

    def forward(
        self,
        normed: torch.Tensor,
        residual: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        batch: ForwardBatch[Any],
        backend: AttentionBackend[Any],
        kv: CachedTensors,
        recorder: RouteRecorder | None,
    ) -> tuple[PartialSum, torch.Tensor]:
        """The input, normed and as it is, to what the MLP adds and the residual stream to add it to, all [P, D]: this
        rank's rows, as `batch.layout` spreads them."""
        layout = batch.layout
        attended = layout.run_sharded(lambda rows: self.self_attn(rows, rope, batch, backend, kv), normed)
        normed, residual = self.post_attention_layernorm.add(attended, residual)
        if isinstance(self.mlp, MoeLayer):
            return self.mlp(normed, layout, recorder), residual
        return layout.run_sharded(self.mlp, normed), residual

    def sharded_weights(self, prefix: str, config: ModelConfig) -> dict[str, ShardedWeight]:
        mlp_weights = (
            moe_weights(self.mlp, config.moe.num_experts, f"{prefix}.mlp")
            if isinstance(self.mlp, MoeLayer)
            else self.mlp.sharded_weights(f"{prefix}.mlp")
        )
        return {
            f"{prefix}.input_layernorm.weight": self.input_layernorm.sharded_weight(),
            f"{prefix}.post_attention_layernorm.weight": self.post_attention_layernorm.sharded_weight(),
            **self.self_attn.sharded_weights(f"{prefix}.self_attn"),
            **mlp_weights,
        }


class Qwen3MoeForCausalLM(nn.Module):
    """A `CausalLM`."""

    def __init__(self, context: ModelContext, num_positions: int) -> None:
        super().__init__()
        config = context.config
        self.config = config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, context.axis, weight_format=context.weight_format
        )
        self.rotary = RotaryEmbedding(num_positions, context)
        self.layers = nn.ModuleList(DecoderLayer(layer_id, context) for layer_id in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, context)
        self.lm_head = ParallelLMHead(
            config.vocab_size, config.hidden_size, context.axis, weight_format=context.weight_format
        )
        if config.tie_word_embeddings:
            self.lm_head.tie(self.embed_tokens)

    def forward(
        self,
        batch: ForwardBatch[Any],
        backend: AttentionBackend[Any],
        kv_store: KVStore,
        recorder: RouteRecorder | None,
    ) -> torch.Tensor:
        residual = batch.layout.scatter(self.embed_tokens(batch.input_ids))
        rope = self.rotary(batch.positions)
        layers = self.decoder_layers()
        normed = layers[0].input_layernorm(residual)
        for layer_id, layer in enumerate(layers):
            added, residual = layer(normed, residual, rope, batch, backend, kv_store.layer(layer_id), recorder)
            # The norm that comes next takes the sum along.
            following = layers[layer_id + 1].input_layernorm if layer_id + 1 < len(layers) else self.norm
            normed, residual = following.add(added, residual)
        return batch.layout.gather(normed)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.lm_head(hidden)
        return logits

    def gather_logits(self, local: torch.Tensor) -> torch.Tensor | None:
        return self.lm_head.gather(local)

    @property
    def logit_columns(self) -> tuple[int, int]:
        return self.lm_head.columns

    def decoder_layers(self) -> list[DecoderLayer]:
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]

    @property
    def attention_shape(self) -> tuple[int, int]:
        return self.decoder_layers()[0].self_attn.output_shape

    def kv_specs(self) -> list[KVTensorSpec]:
        return self.decoder_layers()[0].self_attn.kv_specs(self.config.dtype)

    def sharded_weights(self) -> dict[str, ShardedWeight]:
        weights = {
            "model.embed_tokens.weight": self.embed_tokens.sharded_weight(),
            "model.norm.weight": self.norm.sharded_weight(),
        }
        if not self.config.tie_word_embeddings:
            weights["lm_head.weight"] = self.lm_head.sharded_weight()
        for layer_id, layer in enumerate(self.decoder_layers()):
            weights.update(layer.sharded_weights(f"model.layers.{layer_id}", self.config))
        return weights

    def fused_weights(self) -> dict[str, FusedWeight]:
        fused: dict[str, FusedWeight] = {}
        for layer_id, layer in enumerate(self.decoder_layers()):
            if isinstance(layer.mlp, MoeLayer):
                fused.update(fused_moe_weights(layer.mlp, self.config.moe.num_experts, f"model.layers.{layer_id}.mlp"))
        return fused

    @property
    def ignored_weights(self) -> frozenset[str]:
        return frozenset({"lm_head.weight"} if self.config.tie_word_embeddings else ())
