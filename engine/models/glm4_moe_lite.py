"""GLM-4.7-Flash (Zhipu AI 2026): DeepSeek-V3's layers, of which the configuration names the dense ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .deepseek_v3 import num_extra_layers, parse_latent, parse_moe
from .model_config import ModelConfig, model_config

if TYPE_CHECKING:
    from transformers import Glm4MoeLiteConfig


def parse_config(hf_config: Glm4MoeLiteConfig, model_path: str, dtype: str) -> ModelConfig:
    """The engine's view of a checkpoint's configuration.

    Raises:
        ValueError: the checkpoint asks for something that this model file does not compute.
    """
    kinds = hf_config.mlp_layer_types[: hf_config.num_hidden_layers]
    unknown = set(kinds) - {"dense", "sparse"}
    if unknown or len(kinds) < hf_config.num_hidden_layers or "sparse" not in kinds:
        raise ValueError(
            f"mlp_layer_types: must say 'dense' or 'sparse' for each of {hf_config.num_hidden_layers} layers, the latter "
            "at least once"
        )
    layer_ids = tuple(layer for layer, kind in enumerate(kinds) if kind == "sparse")
    attention, moe = parse_latent(hf_config), parse_moe(hf_config, layer_ids)
    return model_config(hf_config, model_path, dtype, attention, moe, num_extra_layers=num_extra_layers(hf_config))
