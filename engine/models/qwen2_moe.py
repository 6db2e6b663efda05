"""Qwen1.5- and Qwen2-MoE (Qwen Team 2024): grouped queries with biases, a shared expert with a gate of its own, and where
the configuration says so dense layers and layers with a sliding window."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...parallel.moe.router import RouterConfig
from .decoder import DecoderLM, LayerParts
from .grouped_query_attention import GroupedQueryAttention
from .model_config import (
    GroupedQueryConfig,
    ModelConfig,
    MoeConfig,
    SharedExpertConfig,
    head_width,
    model_config,
    refuse_others,
    windows_of,
)
from .model_context import ModelContext
from .moe_block import MixedMLP, MoeNames
from .qwen3_moe import sparse_layers
from .rotary import parse_rope

if TYPE_CHECKING:
    from transformers import Qwen2MoeConfig

NAMES = MoeNames(shared="shared_expert")


def parse_config(hf_config: Qwen2MoeConfig, model_path: str, dtype: str) -> ModelConfig:
    """The engine's view of a checkpoint's configuration.

    Raises:
        ValueError: the checkpoint asks for something that this model file does not compute.
    """
    refuse_others(hf_config, hidden_act="silu")
    width = head_width(hf_config)
    attention = GroupedQueryConfig(
        num_heads=hf_config.num_attention_heads,
        num_kv_heads=hf_config.num_key_value_heads,
        head_dim=width,
        rope=parse_rope(hf_config, width),
        windows=windows_of(hf_config),
        qkv_bias=hf_config.qkv_bias,
    )
    moe = MoeConfig(
        layer_ids=sparse_layers(hf_config),
        router=RouterConfig(
            hf_config.num_experts, hf_config.num_experts_per_tok, renormalises=hf_config.norm_topk_prob
        ).checked(),
        intermediate_size=hf_config.moe_intermediate_size,
        shared=SharedExpertConfig(hf_config.shared_expert_intermediate_size, gated=True),
    )
    return model_config(hf_config, model_path, dtype, attention, moe)


def build(context: ModelContext, num_positions: int) -> DecoderLM:
    return DecoderLM(context, num_positions, LayerParts(GroupedQueryAttention, MixedMLP(NAMES)))
