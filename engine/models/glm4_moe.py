"""GLM-4.5 and 4.6 (Zhipu AI 2025): grouped queries turned in part, sigmoid routing in groups, shared experts, dense layers
first."""

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
)
from .model_context import ModelContext
from .moe_block import MixedMLP
from .rotary import parse_rope

if TYPE_CHECKING:
    from transformers import Glm4MoeConfig


def parse_config(hf_config: Glm4MoeConfig, model_path: str, dtype: str) -> ModelConfig:
    """The engine's view of a checkpoint's configuration.

    Raises:
        ValueError: the checkpoint asks for something that this model file does not compute.
    """
    refuse_others(hf_config, hidden_act="silu")
    num_layers, width = hf_config.num_hidden_layers, head_width(hf_config)
    attention = GroupedQueryConfig(
        num_heads=hf_config.num_attention_heads,
        num_kv_heads=hf_config.num_key_value_heads,
        head_dim=width,
        rope=parse_rope(hf_config, width),
        windows=(None,) * num_layers,
        qkv_bias=hf_config.attention_bias,
        norms="head" if hf_config.use_qk_norm else "none",
    )
    if hf_config.first_k_dense_replace >= num_layers:
        raise ValueError(
            f"the checkpoint has no MoE layer: first_k_dense_replace={hf_config.first_k_dense_replace} of {num_layers}"
        )
    moe = MoeConfig(
        layer_ids=tuple(range(hf_config.first_k_dense_replace, num_layers)),
        router=RouterConfig(
            hf_config.n_routed_experts,
            hf_config.num_experts_per_tok,
            "sigmoid",
            renormalises=hf_config.norm_topk_prob,
            correction=True,
            num_groups=hf_config.n_group,
            num_chosen_groups=hf_config.topk_group,
            scale=hf_config.routed_scaling_factor,
            wide_weights=True,
        ).checked(),
        intermediate_size=hf_config.moe_intermediate_size,
        shared=SharedExpertConfig(hf_config.moe_intermediate_size * hf_config.n_shared_experts),
    )
    return model_config(
        hf_config, model_path, dtype, attention, moe, num_extra_layers=hf_config.num_nextn_predict_layers
    )


def build(context: ModelContext, num_positions: int) -> DecoderLM:
    return DecoderLM(context, num_positions, LayerParts(GroupedQueryAttention, MixedMLP()))
