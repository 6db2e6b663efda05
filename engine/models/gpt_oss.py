"""gpt-oss (OpenAI 2025): grouped queries with sinks, windows in some layers, clamped experts with biases, top-k by logits.

Checkpoints hold a layer's experts fused, in floating point or, on the hub, in MXFP4 (`mxfp4.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...parallel.moe.activation import SwigluClamp
from ...parallel.moe.router import RouterConfig
from ...parallel.weights import ShardedWeight
from .causal_lm import FusedWeight
from .decoder import DecoderLM, LayerParts
from .grouped_query_attention import GroupedQueryAttention
from .model_config import GroupedQueryConfig, ModelConfig, MoeConfig, model_config, refuse_others, windows_of
from .model_context import ModelContext
from .moe_block import MoeBlock, MoeNames
from .rotary import parse_rope

if TYPE_CHECKING:
    from transformers import GptOssConfig

NAMES = MoeNames(router="router")
# Where a configuration has none.
SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0


def parse_config(hf_config: GptOssConfig, model_path: str, dtype: str) -> ModelConfig:
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
        windows=windows_of(hf_config),
        qkv_bias=hf_config.attention_bias,
        output_bias=hf_config.attention_bias,
        sinks=True,
    )
    moe = MoeConfig(
        layer_ids=tuple(range(hf_config.num_hidden_layers)),
        router=RouterConfig(
            hf_config.num_local_experts, hf_config.num_experts_per_tok, "softmax_of_chosen", bias=True
        ).checked(),
        intermediate_size=hf_config.intermediate_size,
        clamp=parse_clamp(hf_config.to_dict()),
    )
    return model_config(hf_config, model_path, dtype, attention, moe, wide_norms=True)


def parse_clamp(fields: dict[str, Any]) -> SwigluClamp:
    """Older versions of `transformers` have constants in place of these fields."""
    return SwigluClamp(fields.get("swiglu_alpha", SWIGLU_ALPHA), fields.get("swiglu_limit", SWIGLU_LIMIT))


class ClampedMoeBlock(MoeBlock):
    """Its experts' tensors stand fused in a checkpoint, under the names that they have in memory."""

    def __init__(self, layer_id: int, context: ModelContext) -> None:
        super().__init__(layer_id, context, NAMES)

    def expert_weights(self, prefix: str) -> dict[str, ShardedWeight]:
        return self.experts.transposed_weights(f"{prefix}.experts")

    def fused_weights(self, layer: str) -> dict[str, FusedWeight]:
        return {}


def build(context: ModelContext, num_positions: int) -> DecoderLM:
    return DecoderLM(context, num_positions, LayerParts(GroupedQueryAttention, ClampedMoeBlock))
