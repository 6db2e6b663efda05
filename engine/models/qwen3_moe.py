"""Qwen3-MoE (Qwen Team 2025): grouped queries with a norm per head, rotary positions, top-k softmax routing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...parallel.moe.router import RouterConfig
from .decoder import DecoderLM, LayerParts
from .grouped_query_attention import GroupedQueryAttention
from .model_config import GroupedQueryConfig, ModelConfig, MoeConfig, model_config, refuse_others
from .model_context import ModelContext
from .moe_block import MixedMLP
from .rotary import parse_rope

if TYPE_CHECKING:
    from transformers import Qwen2MoeConfig, Qwen3MoeConfig


def parse_config(hf_config: Qwen3MoeConfig, model_path: str, dtype: str) -> ModelConfig:
    """The engine's view of a checkpoint's configuration.

    Raises:
        ValueError: the checkpoint asks for something that this model file does not compute.
    """
    refuse_others(hf_config, hidden_act="silu")
    attention = GroupedQueryConfig(
        num_heads=hf_config.num_attention_heads,
        num_kv_heads=hf_config.num_key_value_heads,
        head_dim=hf_config.head_dim,
        rope=parse_rope(hf_config, hf_config.head_dim),
        # All layers have it, if any.
        windows=(hf_config.sliding_window,) * hf_config.num_hidden_layers,
        qkv_bias=hf_config.attention_bias,
        output_bias=hf_config.attention_bias,
        norms="head",
    )
    moe = MoeConfig(
        layer_ids=sparse_layers(hf_config),
        router=RouterConfig(
            hf_config.num_experts, hf_config.num_experts_per_tok, renormalises=hf_config.norm_topk_prob
        ).checked(),
        intermediate_size=hf_config.moe_intermediate_size,
    )
    return model_config(hf_config, model_path, dtype, attention, moe)


def sparse_layers(hf_config: Qwen2MoeConfig | Qwen3MoeConfig) -> tuple[int, ...]:
    """The layers that route.

    Raises:
        ValueError: there is none.
    """
    layer_ids = tuple(
        layer
        for layer in range(hf_config.num_hidden_layers)
        if layer not in hf_config.mlp_only_layers and (layer + 1) % hf_config.decoder_sparse_step == 0
    )
    if not layer_ids or hf_config.num_experts == 0:
        raise ValueError(
            "the checkpoint has no MoE layer: decoder_sparse_step, mlp_only_layers or num_experts exclude all"
        )
    return layer_ids


def build(context: ModelContext, num_positions: int) -> DecoderLM:
    return DecoderLM(context, num_positions, LayerParts(GroupedQueryAttention, MixedMLP()))
