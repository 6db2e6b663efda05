"""Which model file serves which `model_type`, and how a checkpoint becomes a loaded model.

A family is one entry of `FAMILIES`; nothing outside this folder names a model class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...parallel.mesh import ParallelMesh
from ...parallel.moe.dispatch import SyncClock
from ..config import EngineConfig
from ..routing.hf_config import read_config_file, read_hf_config
from . import deepseek_v3, glm4_moe, glm4_moe_lite, gpt_oss, mixtral, olmoe, qwen2_moe, qwen3_moe, qwen3_vl_moe
from .causal_lm import CausalLM
from .checkpoint import Checkpoint, check_tensors
from .dummy_weights import fill_with_random_values
from .model_config import ModelConfig
from .model_context import ModelContext
from .quantisation import FP8, check_quantisation
from .weight_loader import load_weights


@dataclass(frozen=True)
class ModelFamily:
    """How one `model_type` is served.

    `parse_config(hf_config, model_path, dtype)` raises `ValueError` for what the model file does not compute.
    `build(context, num_positions)` makes this rank's part with uninitialised weights. `quantisations` are those that its
    checkpoints may come in, by `quant_method`.
    """

    parse_config: Callable[[Any, str, str], ModelConfig]
    build: Callable[[ModelContext, int], CausalLM]
    quantisations: frozenset[str] = frozenset({FP8})


FAMILIES = {
    "deepseek_v3": ModelFamily(deepseek_v3.parse_config, deepseek_v3.build),
    "glm4_moe": ModelFamily(glm4_moe.parse_config, glm4_moe.build),
    "glm4_moe_lite": ModelFamily(glm4_moe_lite.parse_config, deepseek_v3.build),
    "gpt_oss": ModelFamily(gpt_oss.parse_config, gpt_oss.build, frozenset({"mxfp4"})),
    # Kimi-K2 (Moonshot AI 2025).
    "kimi_k2": ModelFamily(deepseek_v3.parse_config, deepseek_v3.build),
    "mixtral": ModelFamily(mixtral.parse_config, mixtral.build),
    "olmoe": ModelFamily(olmoe.parse_config, olmoe.build),
    "qwen2_moe": ModelFamily(qwen2_moe.parse_config, qwen2_moe.build),
    "qwen3_moe": ModelFamily(qwen3_moe.parse_config, qwen3_moe.build),
    "qwen3_vl_moe": ModelFamily(qwen3_vl_moe.parse_config, qwen3_vl_moe.build, frozenset()),
}
# The narrowest tile of the matrix units.
MIN_TILE_WIDTH = 16
MAX_CONFIG_BYTES = 16 << 20


def family_of(model_type: str) -> ModelFamily:
    """
    Raises:
        ValueError: no model file serves it.
    """
    if model_type not in FAMILIES:
        raise ValueError(f"model_type={model_type!r}: must be one of {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def load_model_config(config: EngineConfig) -> ModelConfig:
    """Read the checkpoint's configuration, for an engine of this one.

    Raises:
        ValueError: no checkpoint at `model_path`, or one that no model file serves, or not so.
    """
    parsed = load_model_config_of(config.model_path, config.dtype)
    if config.fp8_activations == "e4m3" and not parsed.is_fp8:
        raise ValueError("fp8_activations='e4m3': needs a checkpoint in FP8")
    if config.encoder is not None and parsed.vision is None:
        raise ValueError(f"encoder: {parsed.model_type} models take no images")
    return parsed


def load_model_config_of(model_path: str, dtype: str) -> ModelConfig:
    """
    Raises:
        ValueError: no checkpoint at `model_path`, or one that no model file serves.
    """
    model_type = read_config_file(model_path)["model_type"]
    # Known before `transformers` is asked, which may not know it.
    family = family_of(model_type)
    hf_config = read_hf_config(model_path)
    quantisation = hf_config.to_dict().get("quantization_config")
    if quantisation is not None:
        check_quantisation(
            quantisation, family.quantisations, model_type, hf_config.get_text_config().num_hidden_layers
        )
    parsed = family.parse_config(hf_config, model_path, dtype)
    is_fp8 = quantisation is not None and quantisation["quant_method"] == FP8
    return replace(parsed, model_type=model_type, is_fp8=is_fp8)


def check_update_format(model_path: str, loaded: ModelConfig) -> None:
    """Of a folder whose weights are to replace those of a model that was loaded: the same tensors mean something else in
    another format. One without a config.json, or whose does not speak of it, is in floating point.

    Raises:
        ValueError: its config.json names a format that is not the model's.
    """
    file = Path(model_path) / "config.json"
    if not file.is_file():
        return
    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"model_path={model_path!r}: config.json: must have at most {MAX_CONFIG_BYTES} bytes")
    quantisation = read_config_file(model_path).get("quantization_config")
    if quantisation is None:
        return
    legal = family_of(loaded.model_type).quantisations
    if not loaded.is_fp8:
        legal -= {FP8}
    format_name = "block FP8" if loaded.is_fp8 else "floating point"
    try:
        if not isinstance(quantisation, dict):
            raise ValueError("quantization_config: must be an object")
        check_quantisation(quantisation, legal, loaded.model_type, loaded.num_layers)
    except ValueError as error:
        raise ValueError(f"{error}; the engine was started with weights in {format_name}") from None


def build_model(context: ModelContext, num_positions: int) -> CausalLM:
    """This rank's part of a model, its weights uninitialised."""
    return family_of(context.config.model_type).build(context, num_positions)


def check_tiles(model_config: ModelConfig) -> None:
    """
    Raises:
        ValueError: attention kernels of CUDA devices do not serve the model's widths.
    """
    for name, width in model_config.attention.tile_widths.items():
        if width < MIN_TILE_WIDTH or width & (width - 1):
            raise ValueError(f"{name}={width}: must be a power of two from {MIN_TILE_WIDTH} on, on CUDA")


def load_model(
    config: EngineConfig, model_config: ModelConfig, num_positions: int, mesh: ParallelMesh, clock: SyncClock
) -> CausalLM:
    """Build this rank's part of the model and fill it. `clock` runs while ranks meet in MoE layers."""
    if mesh.device.type == "cuda":
        check_tiles(model_config)
    context = ModelContext(
        model_config,
        mesh,
        config.moe_split,
        config.experts_backend,
        config.moe_dispatcher,
        clock,
        config.fp8_activations,
    )
    model = build_model(context, num_positions)
    weights = model.sharded_weights()
    if config.load_format == "dummy":
        fill_with_random_values(weights, model_config.dtype, mesh.device)
        return model
    checkpoint = Checkpoint(config.model_path)
    fused = model.fused_weights()
    check_tensors(weights, checkpoint, model.ignored_weights, fused)
    known = weights | {name: each.weight for name, each in fused.items()}
    load_weights(known, checkpoint, model.ignored_weights, mesh.device)
    return model
