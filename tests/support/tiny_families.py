"""A tiny random checkpoint of every family that the engine serves, made by the stock `transformers` class.

Routing is brittle: gates are scaled up, so that a small error upstream changes a choice, corrections of the scores are far
from zero and experts lie in groups. Norms and biases are random too, since one that is left out would not show else.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Glm4MoeConfig,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    Qwen3VLMoeConfig,
)
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from support.tiny_images import add_images
from support.tiny_latent_families import finish_checkpoint, latent_families
from waybill.engine.routing.transformers_reference import auto_class

TOKENIZER = Path(__file__).parents[2] / "examples" / "tiny_moe" / "checkpoint"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
NUM_EXPERTS, TOP_K = 8, 3
SIZES: dict[str, Any] = {
    # That of the tokenizer.
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 2048,
    "initializer_range": 0.1,
    "eos_token_id": 260,
    "pad_token_id": 0,
    "bos_token_id": None,
}
QWEN: dict[str, Any] = {"num_experts": NUM_EXPERTS, "moe_intermediate_size": 32}
WINDOW = 12
# Behind the tokens of the tokenizer; videos are not served.
VISION_START, IMAGE_PAD, VISION_END, VIDEO_PAD = 261, 262, 263, 263
# Older versions of `transformers` have another limit as a constant.
CLAMP = {"swiglu_limit": 1.0} if "swiglu_limit" in GptOssConfig().to_dict() else {}

FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "glm4_moe": lambda: Glm4MoeConfig(
        **SIZES,
        head_dim=16,
        attention_bias=True,
        use_qk_norm=True,
        n_routed_experts=16,
        moe_intermediate_size=32,
        n_shared_experts=2,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.5,
        first_k_dense_replace=1,
    ),
    "gpt_oss": lambda: GptOssConfig(
        **SIZES, head_dim=16, num_local_experts=NUM_EXPERTS, sliding_window=WINDOW, **CLAMP
    ),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=NUM_EXPERTS, head_dim=None, sliding_window=WINDOW),
    "olmoe": lambda: OlmoeConfig(
        **SIZES, num_experts=NUM_EXPERTS, clip_qkv=1.5, attention_bias=True, norm_topk_prob=False
    ),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **SIZES,
        **QWEN,
        shared_expert_intermediate_size=64,
        mlp_only_layers=[1],
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=3,
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SIZES, **QWEN, head_dim=16, mlp_only_layers=[0], use_sliding_window=True, sliding_window=WINDOW
    ),
    "qwen3_vl_moe": lambda: Qwen3VLMoeConfig(
        text_config={
            **SIZES,
            **QWEN,
            "moe_intermediate_size": 48,
            "head_dim": 16,
            "attention_bias": True,
            "mlp_only_layers": [1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
        },
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": SIZES["hidden_size"],
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 2],
            "initializer_range": 0.2,
        },
        image_token_id=IMAGE_PAD,
        video_token_id=VIDEO_PAD,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    ),
    **latent_families(SIZES),
}


def make_family_model(family: str, seed: int = 0, **changes: int) -> Any:
    """The model of `transformers`, in float32; `changes` of its configuration."""
    torch.manual_seed(seed)
    config = FAMILIES[family]()
    for name, value in changes.items():
        setattr(config.get_text_config(), name, value)
    model = auto_class(config).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            make_brittle(name, tensor)
    return model.eval()


def pack_experts(folder: Path) -> None:
    """Random experts in MXFP4 in place of those of a checkpoint of gpt-oss, as they are on the hub."""
    file, config_file = folder / "model.safetensors", folder / "config.json"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        num_experts, width, num_rows = tensors.pop(name).shape
        groups = (num_experts, num_rows, width // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*groups, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(120, 125, groups, dtype=torch.uint8)
    save_file(tensors, file, metadata={"format": "pt"})
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    quantisation = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"quantization_config": quantisation}))


def unpack_experts(folder: Path) -> None:
    """The same numbers in float32, as `transformers` dequantises them."""
    file, config_file = folder / "model.safetensors", folder / "config.json"
    tensors = load_file(file)
    for blocks in [name for name in tensors if name.endswith("_blocks")]:
        name = blocks.removesuffix("_blocks")
        packed = tensors.pop(blocks), tensors.pop(f"{name}_scales")
        tensors[name] = convert_moe_packed_tensors(*packed, dtype=torch.float32)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads(config_file.read_text())
    del config["quantization_config"]
    config_file.write_text(json.dumps(config))


def make_brittle(name: str, tensor: torch.Tensor) -> None:
    """In place, by the tensor's name in the model."""
    if name.endswith(("gate.weight", "router.weight")):
        tensor *= 4
    elif name.endswith("correction_bias"):
        tensor.normal_(std=0.5)
    elif name.endswith("norm.weight"):
        tensor.uniform_(0.5, 1.5)
    elif name.endswith(("bias", "sinks")):
        tensor.normal_(std=0.5)


def write_family(family: str, folder: Path, seed: int = 0, **changes: int) -> Path:
    """A checkpoint as it stands on the hub, with a tokenizer; `changes` of its configuration."""
    make_family_model(family, seed, **changes).save_pretrained(folder)
    finish_checkpoint(family, folder)
    for name in TOKENIZER_FILES:
        shutil.copy(TOKENIZER / name, folder)
    if family == "qwen3_vl_moe":
        add_images(folder)
    return folder
