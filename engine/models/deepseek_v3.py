"""DeepSeek-V3 (2024) and what is built like it: latent attention, sigmoid routing in groups, shared experts."""

from __future__ import annotations

import math
from typing import Any

from .model_config import LatentConfig
from .rotary import parse_rope


def parse_latent(hf_config: Any) -> LatentConfig:
    """Latent attention, as DeepseekV3Attention of `transformers` has it."""
    width = hf_config.qk_nope_head_dim + hf_config.qk_rope_head_dim
    return LatentConfig(
        num_heads=hf_config.num_attention_heads,
        q_lora_rank=hf_config.q_lora_rank,
        kv_lora_rank=hf_config.kv_lora_rank,
        qk_nope_head_dim=hf_config.qk_nope_head_dim,
        qk_rope_head_dim=hf_config.qk_rope_head_dim,
        v_head_dim=hf_config.v_head_dim,
        rope=parse_rope(hf_config),
        rope_interleave=hf_config.rope_interleave,
        bias=hf_config.attention_bias,
        scale=width**-0.5 * score_factor(hf_config.rope_parameters),
    )


def score_factor(rope_parameters: dict[str, Any]) -> float:
    """What scores are multiplied by where YaRN (Peng et al. 2023) has stretched the positions: `mscale_all_dim` of it is
    not in cos and sin but here, for queries and keys."""
    all_dim = rope_parameters.get("mscale_all_dim", 0)
    if rope_parameters["rope_type"] == "default" or not all_dim or rope_parameters["factor"] <= 1:
        return 1.0
    scale = 0.1 * all_dim * math.log(rope_parameters["factor"]) + 1.0
    return float(scale * scale)
