"""OLMoE (Muennighoff et al. 2024): queries and keys normed over all heads together and maybe clipped; no dense layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...parallel.moe.router import RouterConfig
from .decoder import DecoderLM, LayerParts
from .grouped_query_attention import GroupedQueryAttention
from .model_config import GroupedQueryConfig, ModelConfig, MoeConfig, head_width, model_config, refuse_others
from .model_context import ModelContext
from .moe_block import MixedMLP
from .rotary import parse_rope

if TYPE_CHECKING:
    from transformers import OlmoeConfig


def parse_config(hf_config: OlmoeConfig, model_path: str, dtype: str) -> ModelConfig:
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
        output_bias=hf_config.attention_bias,
        norms="width",
        clip=hf_config.clip_qkv,
    )
    moe = MoeConfig(
        layer_ids=tuple(range(num_layers)),
        router=RouterConfig(
            hf_config.num_experts, hf_config.num_experts_per_tok, renormalises=hf_config.norm_topk_prob
        ).checked(),
        intermediate_size=hf_config.intermediate_size,
    )
    return model_config(hf_config, model_path, dtype, attention, moe)


def build(context: ModelContext, num_positions: int) -> DecoderLM:
    return DecoderLM(context, num_positions, LayerParts(GroupedQueryAttention, MixedMLP()))
