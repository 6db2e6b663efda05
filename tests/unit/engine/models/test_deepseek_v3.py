"""What is read of the configurations of DeepSeek-V3 and its relatives, and what of them is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import DeepseekV3Config, Glm4MoeLiteConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from waybill.engine.config import EngineConfig
from waybill.engine.kv_cache.kv_store import KVStore
from waybill.engine.models import deepseek_v3, glm4_moe_lite
from waybill.engine.models.model_config import LatentConfig, ModelConfig
from waybill.engine.models.model_context import ModelContext
from waybill.engine.models.registry import build_model, check_tiles, load_model_config
from waybill.parallel.mesh import ParallelMesh

# As the hub has Kimi-K2, but for its sizes.
KIMI_K2: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "eos_token_id": 163585,
    "first_k_dense_replace": 1,
    "hidden_size": 64,
    "intermediate_size": 96,
    "kv_lora_rank": 32,
    "max_position_embeddings": 131072,
    "model_type": "kimi_k2",
    "moe_intermediate_size": 16,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "rope_scaling": {
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "scoring_func": "sigmoid",
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 16,
    "vocab_size": 256,
}


def load(folder: Path, **changes: Any) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(KIMI_K2 | changes))
    return load_model_config(EngineConfig(model_path=str(folder)))


def test_a_configuration_of_the_hub(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert (config.model_type, config.num_extra_layers, config.eos_token_ids) == ("kimi_k2", 0, (163585,))
    assert config.dtype is torch.bfloat16
    assert config.moe.layer_ids == (1, 2)
    assert config.route_geometry(4).dtype.itemsize == 2
    assert config.moe.router.scale == 2.827
    assert config.moe.shared is not None and config.moe.shared.intermediate_size == 16
    attention = config.attention
    assert isinstance(attention, LatentConfig)
    mscale = 0.1 * math.log(32) + 1
    assert attention.scale == pytest.approx(32**-0.5 * mscale**2)
    # Both factors of YaRN are equal: nothing of them is left for cos and sin.
    assert attention.rope.attention_scaling == 1.0
    # One rank reads it and sends it to the others.
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=ModelConfig) == config


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e4},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0, "mscale_all_dim": 0.5},
        {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 8.0,
            "mscale": 0.5,
            "mscale_all_dim": 0.7,
            "original_max_position_embeddings": 16,
        },
    ],
)
def test_the_scale_of_scores_is_that_of_transformers(rope: dict[str, Any]) -> None:
    hf_config = DeepseekV3Config(num_attention_heads=2, num_key_value_heads=2, rope_parameters=rope)
    assert deepseek_v3.parse_latent(hf_config).scale == DeepseekV3Attention(hf_config, 0).scaling


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scoring_func": "softmax"}, "scoring_func='softmax': must be 'sigmoid'"),
        ({"topk_method": "greedy"}, "topk_method='greedy': must be 'noaux_tc'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2: must be 1"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu': must be 'silu'"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2: must be 4"),
        ({"first_k_dense_replace": 3}, "no MoE layer: first_k_dense_replace=3 of 3"),
        ({"n_shared_experts": 0}, "n_shared_experts=0: must be at least 1"),
        ({"n_group": None}, "n_group: must be given"),
        ({"n_group": 5}, "n_group=5: must divide 384"),
        ({"n_group": 4, "topk_group": 5}, "topk_group=5"),
        ({"num_experts_per_tok": 385}, "num_experts_per_tok=385"),
        (
            {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            r"rope_parameters\.partial_rotary_factor: must be 1",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
    ],
)
def test_what_is_not_computed_is_refused_with_the_fields_name(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        load(tmp_path, **changes)


@pytest.mark.parametrize("kinds", [["dense", "sparse"], ["dense"] * 3, ["dense", "sparse", "wide"]])
def test_kinds_of_layers_of_glm_are_checked(kinds: list[str]) -> None:
    hf_config = Glm4MoeLiteConfig(num_hidden_layers=3, mlp_layer_types=kinds)
    with pytest.raises(ValueError, match="mlp_layer_types: must say 'dense' or 'sparse' for each of 3 layers"):
        glm4_moe_lite.parse_config(hf_config, "nowhere", "auto")


def test_glm_names_its_dense_layers_and_drafting_ones() -> None:
    kinds = ["dense", "sparse", "dense", "sparse"]
    hf_config = Glm4MoeLiteConfig(num_hidden_layers=4, mlp_layer_types=kinds, num_nextn_predict_layers=1)
    config = glm4_moe_lite.parse_config(hf_config, "nowhere", "bfloat16")
    assert (config.moe.layer_ids, config.num_extra_layers) == ((1, 3), 1)


def test_a_latent_is_kept_once_on_every_rank(tmp_path: Path) -> None:
    config = load(tmp_path, num_nextn_predict_layers=1)
    model = build_model(ModelContext(config, ParallelMesh.single(torch.device("cpu"))), 64)
    assert model.attention_shape == (4, 16)
    # 48 numbers of 2 bytes in each of 3 layers, whatever the number of heads.
    assert KVStore.bytes_per_token(config.num_layers, model.kv_specs()) == 3 * 48 * 2
    assert "model.layers.3.eh_proj.weight" in model.ignored_weights
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" in model.ignored_weights
    assert "model.layers.30.eh_proj.weight" not in model.ignored_weights


@pytest.mark.parametrize(("field", "width"), [("kv_lora_rank", 48), ("qk_rope_head_dim", 8)])
def test_widths_that_kernels_do_not_serve_are_refused_on_cuda(tmp_path: Path, field: str, width: int) -> None:
    check_tiles(load(tmp_path))
    with pytest.raises(ValueError, match=f"{field}={width}: must be a power of two from 16 on, on CUDA"):
        check_tiles(load(tmp_path, **{field: width}))
