"""The shapes of models that the benchmarks run: configurations, and every tensor of their checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import DeepseekV3Config, Glm4MoeConfig, GptOssConfig, PreTrainedConfig, Qwen3MoeConfig

from waybill.engine.routing.hf_config import RENAMED

END_OF_TURN = 260
CONFIGS: dict[str, tuple[type[PreTrainedConfig], str]] = {
    "qwen3_moe": (Qwen3MoeConfig, "Qwen3MoeForCausalLM"),
    "deepseek_v3": (DeepseekV3Config, "DeepseekV3ForCausalLM"),
    "glm4_moe": (Glm4MoeConfig, "Glm4MoeForCausalLM"),
    "gpt_oss": (GptOssConfig, "GptOssForCausalLM"),
}
# Those with a correction of the scores, shared experts, and dense layers first.
LIKE_DEEPSEEK = ("deepseek_v3", "glm4_moe")

QWEN3_30B: dict[str, object] = {
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}
LATENT: dict[str, object] = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
    "vocab_size": 163840,
}
MOONLIGHT: dict[str, object] = LATENT | {
    "model_type": "deepseek_v3",
    "hidden_size": 2048,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "routed_scaling_factor": 2.446,
    "moe_intermediate_size": 1408,
    "intermediate_size": 11264,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
    "rms_norm_eps": 1e-5,
}
KIMI_K2: dict[str, object] = LATENT | {
    "model_type": "kimi_k2",
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "q_lora_rank": 1536,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "routed_scaling_factor": 2.827,
    "moe_intermediate_size": 2048,
    "intermediate_size": 18432,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 50000.0,
        "factor": 32.0,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
}
GLM_4_5_AIR: dict[str, object] = {
    "model_type": "glm4_moe",
    "hidden_size": 4096,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "attention_bias": True,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1408,
    "intermediate_size": 10944,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "vocab_size": 151552,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "partial_rotary_factor": 0.5},
}
# Experts in 16 bits, which the hub has in MXFP4. Layers alternate between a window and none.
GPT_OSS_20B: dict[str, object] = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "intermediate_size": 2880,
    "sliding_window": 128,
    "vocab_size": 201088,
    "max_position_embeddings": 131072,
}
TOY_GROUPED: dict[str, object] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 512,
}
# A dense layer and one with experts.
NARROW: dict[str, object] = {"num_hidden_layers": 2, "vocab_size": 8192}
TOY_LATENT: dict[str, object] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "moe_intermediate_size": 16,
    "intermediate_size": 96,
    "vocab_size": 512,
}
SHAPES: dict[str, dict[str, object]] = {
    "30b": QWEN3_30B,
    # 10 GB in bfloat16.
    "wide8": QWEN3_30B | {"num_hidden_layers": 8, "vocab_size": 8192, "max_position_embeddings": 8192},
    "wide": QWEN3_30B | {"num_hidden_layers": 2, "vocab_size": 8192, "max_position_embeddings": 8192},
    "toy30b": QWEN3_30B
    | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
    | {"num_experts": 16, "moe_intermediate_size": 32, "vocab_size": 512},
    "M": {
        "hidden_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "intermediate_size": 4096,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
    },
    "routing30b": {
        "hidden_size": 32,
        "num_hidden_layers": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 8,
        "intermediate_size": 64,
        "vocab_size": 512,
        "max_position_embeddings": 40960,
    },
    "deep": {
        "hidden_size": 64,
        "num_hidden_layers": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 64,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 32,
        "intermediate_size": 192,
        "vocab_size": 264,
        "max_position_embeddings": 2048,
    },
    "T": {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "intermediate_size": 96,
        "vocab_size": 512,
        "max_position_embeddings": 2048,
        "mlp_only_layers": [0],
    },
    "moonlight": MOONLIGHT,
    "moonlight2": MOONLIGHT | NARROW,
    "toymoonlight": MOONLIGHT | TOY_LATENT,
    "kimik2": KIMI_K2,
    # 37 GB in bfloat16.
    "kimik2_2": KIMI_K2 | NARROW,
    "toykimik2": KIMI_K2 | TOY_LATENT | {"q_lora_rank": 32},
    "glm4.5air": GLM_4_5_AIR,
    # 6 GB in bfloat16.
    "glm4.5air2": GLM_4_5_AIR | NARROW,
    "toyglm4.5air": GLM_4_5_AIR | TOY_GROUPED | {"moe_intermediate_size": 16},
    "gptoss20b": GPT_OSS_20B,
    # 3.4 GB in bfloat16.
    "gptoss20b_2": GPT_OSS_20B | NARROW,
    "toygptoss20b": GPT_OSS_20B | TOY_GROUPED,
}


def make_config(shape: str) -> PreTrainedConfig:
    """The configuration of a named shape."""
    return config_of(SHAPES[shape], END_OF_TURN)


def config_of(shape: dict[str, object], eos_token_id: int | None) -> PreTrainedConfig:
    """Untied, renormalised top-k, bfloat16."""
    fields = dict(shape)
    model_type = str(fields.pop("model_type", "qwen3_moe"))
    kind, architecture = CONFIGS[RENAMED.get(model_type, model_type)]
    if model_type != "gpt_oss":
        fields["norm_topk_prob"] = True
    return kind(
        **fields,
        architectures=[architecture],
        tie_word_embeddings=False,
        eos_token_id=eos_token_id,
        dtype="bfloat16",
    )


def config_changes(shape: str) -> dict[str, object]:
    """What to write into config.json that `transformers` does not."""
    model_type = SHAPES[shape].get("model_type")
    return {"model_type": model_type} if model_type in RENAMED else {}


def tensor_shapes(config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the checkpoint by its name on the hub."""
    hidden, is_latent = config.hidden_size, config.model_type == "deepseek_v3"
    dense_layers = range(config.first_k_dense_replace) if config.model_type in LIKE_DEEPSEEK else ()
    if config.model_type == "qwen3_moe":
        dense_layers = config.mlp_only_layers
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        yield from (latent_shapes if is_latent else grouped_shapes)(f"{prefix}.self_attn", config)
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        if layer in dense_layers:
            yield from mlp_shapes(f"{prefix}.mlp", hidden, config.intermediate_size)
        else:
            yield from moe_shapes(f"{prefix}.mlp", config)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config.vocab_size, hidden)


def num_experts_of(config: Any) -> int:
    return int(config.n_routed_experts if config.model_type in LIKE_DEEPSEEK else config.num_experts)


def grouped_shapes(prefix: str, config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, width, num_kv_heads = config.hidden_size, config.head_dim, config.num_key_value_heads
    for name, heads in (("q", config.num_attention_heads), ("k", num_kv_heads), ("v", num_kv_heads)):
        yield f"{prefix}.{name}_proj.weight", (heads * width, hidden)
        if config.attention_bias:
            yield f"{prefix}.{name}_proj.bias", (heads * width,)
        if name != "v" and config.model_type == "qwen3_moe":
            yield f"{prefix}.{name}_norm.weight", (width,)
    yield f"{prefix}.o_proj.weight", (hidden, config.num_attention_heads * width)
    if config.model_type == "gpt_oss":
        yield f"{prefix}.o_proj.bias", (hidden,)
        yield f"{prefix}.sinks", (config.num_attention_heads,)


def latent_shapes(prefix: str, config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    q_width = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    if config.q_lora_rank is None:
        yield f"{prefix}.q_proj.weight", (q_width, hidden)
    else:
        yield f"{prefix}.q_a_proj.weight", (config.q_lora_rank, hidden)
        yield f"{prefix}.q_a_layernorm.weight", (config.q_lora_rank,)
        yield f"{prefix}.q_b_proj.weight", (q_width, config.q_lora_rank)
    yield f"{prefix}.kv_a_proj_with_mqa.weight", (rank + config.qk_rope_head_dim, hidden)
    yield f"{prefix}.kv_a_layernorm.weight", (rank,)
    yield f"{prefix}.kv_b_proj.weight", (heads * (config.qk_nope_head_dim + config.v_head_dim), rank)
    yield f"{prefix}.o_proj.weight", (hidden, heads * config.v_head_dim)


def moe_shapes(prefix: str, config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    if config.model_type == "gpt_oss":
        yield from clamped_shapes(prefix, config)
        return
    hidden, width, num_experts = config.hidden_size, config.moe_intermediate_size, num_experts_of(config)
    yield f"{prefix}.gate.weight", (num_experts, hidden)
    if config.model_type in LIKE_DEEPSEEK:
        yield f"{prefix}.gate.e_score_correction_bias", (num_experts,)
        yield from mlp_shapes(f"{prefix}.shared_experts", hidden, config.n_shared_experts * width)
    for expert in range(num_experts):
        yield from mlp_shapes(f"{prefix}.experts.{expert}", hidden, width)


def clamped_shapes(prefix: str, config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The experts of gpt-oss, fused, and transposed."""
    hidden, width, num_experts = config.hidden_size, config.intermediate_size, num_experts_of(config)
    yield f"{prefix}.router.weight", (num_experts, hidden)
    yield f"{prefix}.router.bias", (num_experts,)
    yield f"{prefix}.experts.gate_up_proj", (num_experts, hidden, 2 * width)
    yield f"{prefix}.experts.gate_up_proj_bias", (num_experts, 2 * width)
    yield f"{prefix}.experts.down_proj", (num_experts, width, hidden)
    yield f"{prefix}.experts.down_proj_bias", (num_experts, hidden)


def mlp_shapes(prefix: str, hidden: int, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The three matrices of one expert, or of a dense layer."""
    yield f"{prefix}.gate_proj.weight", (width, hidden)
    yield f"{prefix}.up_proj.weight", (width, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, width)


def fuse_experts(tensors: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """The same tensors as `transformers` has them in memory: the experts of a layer in two."""
    fused = {name: tensor for name, tensor in tensors.items() if ".mlp.experts." not in name}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        if f"{prefix}.0.down_proj.weight" in tensors:
            parts = {
                part: torch.stack([tensors[f"{prefix}.{i}.{part}_proj.weight"] for i in range(num_experts_of(config))])
                for part in ("gate", "up", "down")
            }
            fused[f"{prefix}.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
            fused[f"{prefix}.down_proj"] = parts["down"]
    return fused
