"""Qwen3-VL-MoE (Qwen Team 2025): Qwen3-MoE's layers, with images in the prompt.

An image's tokens have positions in time, height and width, which interleaved parts of the frequencies turn by
(`rotary.py`). What the vision tower makes of the image takes the place of their embeddings, and its levels are added to the
hidden states behind the first layers (DeepStack, Meng et al. 2024). The tower is no part of the model here: its tensors are
skipped, and what it makes comes with the step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...parallel.moe.router import RouterConfig
from ...parallel.weights import ShardedWeight
from .causal_lm import FusedWeight, IgnoredWeights
from .decoder import DecoderLM, LayerParts
from .grouped_query_attention import GroupedQueryAttention
from .model_config import (
    GroupedQueryConfig,
    ModelConfig,
    MoeConfig,
    VisionConfig,
    model_config,
    refuse_others,
    resolve_dtype,
)
from .model_context import ModelContext
from .moe_block import MixedMLP, MoeBlock
from .qwen3_moe import sparse_layers
from .rotary import parse_rope

if TYPE_CHECKING:
    from transformers import Qwen3VLMoeConfig

# What checkpoints call the vision tower.
TOWER = "model.visual."


def parse_config(hf_config: Qwen3VLMoeConfig, model_path: str, dtype: str) -> ModelConfig:
    """The engine's view of a checkpoint's configuration.

    Raises:
        ValueError: the checkpoint asks for something that this model file does not compute.
    """
    text = hf_config.text_config
    refuse_others(text, hidden_act="silu")
    attention = GroupedQueryConfig(
        num_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads,
        head_dim=text.head_dim,
        rope=parse_rope(text, text.head_dim),
        windows=(None,) * text.num_hidden_layers,
        qkv_bias=text.attention_bias,
        output_bias=text.attention_bias,
        norms="head",
    )
    moe = MoeConfig(
        layer_ids=sparse_layers(text),
        router=RouterConfig(text.num_experts, text.num_experts_per_tok).checked(),
        intermediate_size=text.moe_intermediate_size,
    )
    # The outer configuration's, as `transformers` has it.
    outer = {
        "tie_word_embeddings": hf_config.tie_word_embeddings,
        "dtype_name": resolve_dtype(dtype, hf_config.dtype or text.dtype),
        "vision": parse_vision(hf_config),
    }
    return model_config(text, model_path, dtype, attention, moe, **outer)


def parse_vision(hf_config: Qwen3VLMoeConfig) -> VisionConfig:
    """
    Raises:
        ValueError: the tower's features do not fit the layers, or the sections of positions not the frequencies.
    """
    text, tower = hf_config.text_config, hf_config.vision_config
    num_levels = len(tower.deepstack_visual_indexes)
    if tower.out_hidden_size != text.hidden_size:
        raise ValueError(f"vision_config.out_hidden_size={tower.out_hidden_size}: must be {text.hidden_size}")
    if num_levels > text.num_hidden_layers:
        raise ValueError(
            f"vision_config.deepstack_visual_indexes: has {num_levels} levels, must have at most "
            f"{text.num_hidden_layers}, one a layer"
        )
    section = tuple(text.rope_parameters.get("mrope_section", (24, 20, 20)))
    if len(section) != 3 or 3 * max(section[1:]) > text.head_dim // 2 + 2:
        raise ValueError(
            f"rope_parameters.mrope_section={list(section)}: must be three, those of height and width at most a third of "
            f"{text.head_dim // 2} frequencies"
        )
    return VisionConfig(hf_config.image_token_id, num_levels, tower.spatial_merge_size, section)


class StackedMoeBlock(MoeBlock):
    """A checkpoint has a layer's experts as two stacks, on the hub of transposed matrices."""

    def expert_weights(self, prefix: str) -> dict[str, ShardedWeight]:
        return self.experts.stacked_weights(f"{prefix}.experts")

    def fused_weights(self, layer: str) -> dict[str, FusedWeight]:
        return {}


class Qwen3VLMoeLM(DecoderLM):
    """The part of the model that has the layers."""

    backbone = "model.language_model"

    @property
    def ignored_weights(self) -> IgnoredWeights:
        others = super().ignored_weights
        return IgnoredWeights(others.names, (*others.prefixes, TOWER), others.suffixes)


def build(context: ModelContext, num_positions: int) -> DecoderLM:
    return Qwen3VLMoeLM(context, num_positions, LayerParts(GroupedQueryAttention, MixedMLP(block=StackedMoeBlock)))
