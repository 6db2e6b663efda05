"""GLM-4.5 and 4.6 (Zhipu AI 2025): grouped queries turned in part, sigmoid routing in groups, shared experts, dense layers
first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .decoder import DecoderLM, LayerParts
from .deepseek_v3 import num_extra_layers, parse_moe
from .grouped_query_attention import GroupedQueryAttention
from .model_config import GroupedQueryConfig, ModelConfig, head_width, model_config
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
    num_layers, width = hf_config.num_hidden_layers, head_width(hf_config)
    attention = GroupedQueryConfig(
        num_heads=hf_config.num_attention_heads,
        num_kv_heads=hf_config.num_key_value_heads,
        head_dim=width,
        rope=parse_rope(hf_config, width, in_part=True),
        windows=(None,) * num_layers,
        qkv_bias=hf_config.attention_bias,
        norms="head" if hf_config.use_qk_norm else "none",
    )
    num_dense = hf_config.first_k_dense_replace
    if num_dense >= num_layers:
        raise ValueError(f"the checkpoint has no MoE layer: first_k_dense_replace={num_dense} of {num_layers}")
    moe = parse_moe(hf_config, tuple(range(num_dense, num_layers)))
    return model_config(hf_config, model_path, dtype, attention, moe, num_extra_layers=num_extra_layers(hf_config))


def build(context: ModelContext, num_positions: int) -> DecoderLM:
    return DecoderLM(context, num_positions, LayerParts(GroupedQueryAttention, MixedMLP()))
