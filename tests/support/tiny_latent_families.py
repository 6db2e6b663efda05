"""Tiny checkpoints of the families with latent attention, as `tiny_families.py` has the others; with what real ones have
beside the model's own tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, Glm4MoeLiteConfig, PreTrainedConfig

# Widths of latents that kernels on CUDA serve.
LATENT: dict[str, Any] = {
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    # Not that of the norms of latents.
    "rms_norm_eps": 1e-5,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
    "original_max_position_embeddings": 512,
}


def latent_families(sizes: dict[str, Any]) -> dict[str, Callable[[], PreTrainedConfig]]:
    """`sizes` are what all families have."""
    sizes = sizes | LATENT
    return {
        # As Moonlight: queries of no latent.
        "deepseek_v3": lambda: DeepseekV3Config(
            **sizes,
            q_lora_rank=None,
            n_routed_experts=16,
            n_shared_experts=2,
            n_group=4,
            topk_group=2,
            first_k_dense_replace=1,
            routed_scaling_factor=1.7,
            rope_parameters=YARN,
            num_nextn_predict_layers=1,
        ),
        "glm4_moe_lite": lambda: Glm4MoeLiteConfig(
            **sizes | {"v_head_dim": 40},
            q_lora_rank=28,
            n_routed_experts=16,
            n_group=2,
            topk_group=1,
            mlp_layer_types=["sparse", "dense", "sparse", "sparse"],
            attention_bias=True,
            rope_interleave=False,
        ),
        # Ids beyond a byte.
        "kimi_k2": lambda: DeepseekV3Config(
            **sizes | {"moe_intermediate_size": 8},
            q_lora_rank=28,
            n_routed_experts=320,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=2,
            routed_scaling_factor=2.8,
            rope_parameters=YARN | {"mscale_all_dim": 1.0},
            num_nextn_predict_layers=0,
        ),
    }


def finish_checkpoint(family: str, folder: Path) -> None:
    """What `transformers` does not write."""
    if family == "deepseek_v3":
        add_unused_tensors(folder / "model.safetensors")
    if family == "kimi_k2":
        rename_config(folder / "config.json")


def add_unused_tensors(file: Path) -> None:
    """A layer that drafts tokens, and frequencies as old checkpoints have them."""
    tensors = load_file(file)
    last = max(int(name.split(".")[2]) for name in tensors if name.startswith("model.layers."))
    drafting = f"model.layers.{last + 1}"
    for name in [name for name in tensors if name.startswith(f"model.layers.{last}.")]:
        tensors[drafting + name.removeprefix(f"model.layers.{last}")] = torch.full_like(tensors[name], torch.nan)
    width = tensors["model.norm.weight"].shape[0]
    for name, shape in {
        "eh_proj.weight": (width, 2 * width),
        "enorm.weight": (width,),
        "hnorm.weight": (width,),
        "embed_tokens.weight": (264, width),
        "shared_head.norm.weight": (width,),
        "shared_head.head.weight": (264, width),
    }.items():
        tensors[f"{drafting}.{name}"] = torch.full(shape, torch.nan)
    for layer in range(last + 1):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.full((8,), torch.nan)
    save_file(tensors, file, metadata={"format": "pt"})


def rename_config(file: Path) -> None:
    """As Kimi-K2 has it, with code that nobody may run."""
    fields = json.loads(file.read_text())
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    file.write_text(json.dumps(fields | {"model_type": "kimi_k2", "auto_map": auto_map}))
