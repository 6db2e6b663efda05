"""Which model file serves which `model_type`, and how a checkpoint becomes a loaded model."""

from __future__ import annotations

from ...parallel.mesh import ParallelMesh
from ...parallel.moe.dispatch import SyncClock
from ..config import EngineConfig
from . import qwen3_moe
from .checkpoint import Checkpoint, check_tensors, load_weights
from .model_config import ModelConfig, read_hf_config
from .qwen3_moe import ModelContext, Qwen3MoeForCausalLM

MODEL_FILES = {"qwen3_moe": qwen3_moe}


def load_model_config(config: EngineConfig) -> ModelConfig:
    """Read the checkpoint's configuration.

    Raises:
        ValueError: no checkpoint at `model_path`, or one that no model file serves.
    """
    hf_config = read_hf_config(config.model_path)
    if hf_config.model_type not in MODEL_FILES:
        raise ValueError(f"model_type={hf_config.model_type!r}: must be one of {', '.join(MODEL_FILES)}")
    return MODEL_FILES[hf_config.model_type].parse_config(hf_config, config.model_path, config.dtype)


def load_model(
    config: EngineConfig, model_config: ModelConfig, num_positions: int, mesh: ParallelMesh, clock: SyncClock
) -> Qwen3MoeForCausalLM:
    """Build this rank's part of the model and fill it from the checkpoint. `clock` runs while ranks meet in MoE layers."""
    if mesh.device.type == "cuda" and model_config.head_dim & (model_config.head_dim - 1):
        raise ValueError(f"head_dim={model_config.head_dim}: must be a power of two on CUDA")
    context = ModelContext(model_config, mesh, config.moe_split, config.experts_backend, config.moe_dispatcher, clock)
    model = MODEL_FILES[model_config.model_type].Qwen3MoeForCausalLM(context, num_positions)
    weights, checkpoint = model.sharded_weights(), Checkpoint(config.model_path)
    check_tensors(weights, checkpoint, model.ignored_weights)
    load_weights(weights, checkpoint, model.ignored_weights)
    return model.eval()
