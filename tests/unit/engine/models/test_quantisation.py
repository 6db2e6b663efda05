"""What a checkpoint's quantization_config may say."""

from __future__ import annotations

from typing import Any

import pytest

from waybill.engine.models.quantisation import check_quantisation, is_quantised

# As those of Qwen3-30B-A3B-FP8 and of DeepSeek-V3 have it.
ON_THE_HUB: list[dict[str, Any]] = [
    {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "model.layers.0.input_layernorm", "model.layers.0.mlp.gate"],
    },
    {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
]


@pytest.mark.parametrize("config", ON_THE_HUB)
def test_those_of_the_hub(config: dict[str, Any]) -> None:
    check_quantisation(config, frozenset({"fp8"}), "qwen3_moe", 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quant_method": "gptq"}, "quant_method='gptq': must be fp8"),
        ({"fmt": "e5m2"}, "fmt='e5m2': must be 'e4m3'"),
        ({"activation_scheme": "static"}, "activation_scheme='static': must be 'dynamic'"),
        ({"weight_block_size": [64, 64]}, r"weight_block_size=\[64, 64\]"),
        ({"scale_fmt": "ue8m0"}, "scale_fmt='ue8m0': must be None"),
        ({"expert_dtype": "fp4"}, "expert_dtype='fp4': is not known"),
        ({"ignored_layers": ["model.layers.0.self_attn.o_proj"]}, "ignored_layers: 'model.layers.0.self_attn.o_proj'"),
        ({"modules_to_not_convert": ["model.layers.3"]}, "modules_to_not_convert: 'model.layers.3'"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"quantization_config.{words}"):
        check_quantisation(ON_THE_HUB[0] | change, frozenset({"fp8"}), "qwen3_moe", 4)


def test_layers_that_are_not_used_may_be_anything() -> None:
    names = ["model.layers.4", "model.layers.4.eh_proj", "model.layers.1.mlp.gate.e_score_correction_bias"]
    check_quantisation(ON_THE_HUB[0] | {"modules_to_not_convert": names}, frozenset({"fp8"}), "deepseek_v3", 4)


def test_which_modules_are_quantised() -> None:
    layer = "model.layers.2"
    quantised = [f"{layer}.self_attn.q_proj", f"{layer}.self_attn.kv_b_proj", f"{layer}.mlp.experts.3.gate_proj"]
    floats = ["lm_head", "model.embed_tokens", f"{layer}.mlp.gate", f"{layer}.mlp.shared_expert_gate", "model.norm"]
    floats += [f"{layer}.self_attn.q_a_layernorm", f"{layer}.self_attn.q_norm"]
    assert all(map(is_quantised, quantised)) and not any(map(is_quantised, floats))
