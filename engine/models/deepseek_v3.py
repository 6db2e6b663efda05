"""DeepSeek-V3 (2024), and what is built like it (R1, Moonlight, Kimi-K2): latent attention, sigmoid routing in groups,
shared experts, dense layers first."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ...parallel.moe.router import RouterConfig
from .decoder import DecoderLM, LayerParts
from .latent_attention import LatentAttention
from .model_config import LatentConfig, ModelConfig, MoeConfig, SharedExpertConfig, model_config, refuse_others
from .model_context import ModelContext
from .moe_block import MixedMLP
from .rotary import parse_rope

if TYPE_CHECKING:
    from transformers import DeepseekV3Config

# Fields that the hub's configurations have and `transformers` does not read, and what it computes.
UNREAD_FIELDS = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}


def parse_config(hf_config: DeepseekV3Config, model_path: str, dtype: str) -> ModelConfig:
    """The engine's view of a checkpoint's configuration.

    Raises:
        ValueError: the checkpoint asks for something that this model file does not compute.
    """
    num_layers, num_dense = hf_config.num_hidden_layers, hf_config.first_k_dense_replace
    if num_dense is None or num_dense >= num_layers:
        raise ValueError(f"the checkpoint has no MoE layer: first_k_dense_replace={num_dense} of {num_layers}")
    attention, moe = parse_latent(hf_config), parse_moe(hf_config, tuple(range(num_dense, num_layers)))
    return model_config(hf_config, model_path, dtype, attention, moe, num_extra_layers=num_extra_layers(hf_config))


def parse_latent(hf_config: Any) -> LatentConfig:
    """Latent attention, as DeepseekV3Attention of `transformers` has it.

    Raises:
        ValueError: heads share keys, or a key is rotated in part.
    """
    # Every head has keys and values of its own.
    refuse_others(hf_config, num_key_value_heads=hf_config.num_attention_heads)
    rope = parse_rope(hf_config, hf_config.qk_rope_head_dim, in_part=True)
    if 2 * len(rope.inv_freq) != hf_config.qk_rope_head_dim:
        raise ValueError("rope_parameters.partial_rotary_factor: must be 1, all of qk_rope_head_dim is rotated")
    width = hf_config.qk_nope_head_dim + hf_config.qk_rope_head_dim
    return LatentConfig(
        num_heads=hf_config.num_attention_heads,
        q_lora_rank=hf_config.q_lora_rank,
        kv_lora_rank=hf_config.kv_lora_rank,
        qk_nope_head_dim=hf_config.qk_nope_head_dim,
        qk_rope_head_dim=hf_config.qk_rope_head_dim,
        v_head_dim=hf_config.v_head_dim,
        rope=rope,
        rope_interleave=bool(hf_config.rope_interleave),
        bias=hf_config.attention_bias,
        scale=score_scale(width, hf_config.rope_parameters),
    )


def score_scale(width: int, rope_parameters: dict[str, Any]) -> float:
    """What scores are multiplied by. Where YaRN (Peng et al. 2023) has stretched the positions, its `mscale_all_dim` is not
    in cos and sin but here, for queries and for keys."""
    scale = float(width**-0.5)
    all_dim = rope_parameters.get("mscale_all_dim", 0)
    if rope_parameters["rope_type"] == "default" or not all_dim or rope_parameters["factor"] <= 1:
        return scale
    stretch = 0.1 * all_dim * math.log(rope_parameters["factor"]) + 1.0
    return float(scale * stretch * stretch)


def parse_moe(hf_config: Any, layer_ids: tuple[int, ...]) -> MoeConfig:
    """
    Raises:
        ValueError: experts are chosen in another way, or none is shared.
    """
    refuse_others(hf_config, hidden_act="silu")
    stated = hf_config.to_dict()
    for name, value in UNREAD_FIELDS.items():
        if stated.get(name, value) != value:
            raise ValueError(f"{name}={stated[name]!r}: must be {value!r}")
    if not hf_config.n_shared_experts:
        raise ValueError(f"n_shared_experts={hf_config.n_shared_experts}: must be at least 1")
    for name in ("n_group", "topk_group", "num_experts_per_tok"):
        if stated[name] is None:
            raise ValueError(f"{name}: must be given")
    router = RouterConfig(
        hf_config.n_routed_experts,
        hf_config.num_experts_per_tok,
        "sigmoid",
        renormalises=bool(hf_config.norm_topk_prob),
        correction=True,
        num_groups=hf_config.n_group,
        num_chosen_groups=hf_config.topk_group,
        scale=hf_config.routed_scaling_factor,
        wide_weights=True,
    )
    return MoeConfig(
        layer_ids=layer_ids,
        router=router.checked(),
        intermediate_size=hf_config.moe_intermediate_size,
        shared=SharedExpertConfig(hf_config.moe_intermediate_size * hf_config.n_shared_experts),
    )


def num_extra_layers(hf_config: Any) -> int:
    """Layers behind the model's own that draft tokens (multi-token prediction)."""
    return int(hf_config.to_dict().get("num_nextn_predict_layers") or 0)


def build(context: ModelContext, num_positions: int) -> DecoderLM:
    return DecoderLM(context, num_positions, LayerParts(LatentAttention, MixedMLP()))
