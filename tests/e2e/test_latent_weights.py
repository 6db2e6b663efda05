"""Latent attention and corrected routers under weight updates: by the names of the hub and of `transformers`, over tp
ranks, read back, and through a release of memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from support.tiny_families import make_family_model, write_family

from waybill import Engine
from waybill.engine.routing.transformers_reference import Reference
from waybill.engine.weight_sync.sender import WeightSender, gathered_tensors

PROMPTS = [list(range(length)) for length in (1, 30, 77)]
READ_BACK = (
    "self_attn.q_a_proj.weight",
    "self_attn.q_a_layernorm.weight",
    "self_attn.q_b_proj.weight",
    "self_attn.kv_a_proj_with_mqa.weight",
    "self_attn.kv_a_proj_with_mqa.bias",
    "self_attn.kv_b_proj.weight",
    "self_attn.o_proj.weight",
    "self_attn.o_proj.bias",
    "mlp.gate.e_score_correction_bias",
    "mlp.shared_experts.down_proj.weight",
    "mlp.experts.5.up_proj.weight",
)


def assert_equals(engine: Engine, reference: Reference) -> None:
    engine.flush_cache()
    answers = engine.generate(
        input_ids=PROMPTS,
        sampling_params={"temperature": 0.0, "max_new_tokens": 6, "ignore_eos": True},
        return_logprob=True,
        return_routed_experts=True,
    )
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        meta: dict[str, Any] = answer["meta_info"]
        logprobs = [logprob for logprob, _, _ in meta["output_token_logprobs"]]
        reference.check_generation(prompt, answer["output_ids"], logprobs, meta["routed_experts"])


def test_updates_of_a_model_with_latents(tmp_path: Path) -> None:
    first, second = (write_family("glm4_moe_lite", tmp_path / str(seed), seed) for seed in range(2))
    references = [Reference(str(folder)) for folder in (first, second)]
    model = make_family_model("glm4_moe_lite", seed=1)
    fused = dict(gathered_tensors(model))
    assert fused.keys() == model.state_dict().keys()
    assert any(name.endswith("experts.gate_up_proj") for name in fused), "as transformers holds them"
    with Engine(
        str(first), tp_size=2, dtype="float32", kv_cache_tokens=400, enable_return_routed_experts=True
    ) as engine:
        assert_equals(engine, references[0])
        engine.update_weights_from_disk(str(second), weight_version="second")
        assert_equals(engine, references[1])
        stored = load_file(second / "model.safetensors")
        for name in READ_BACK:
            name = f"model.layers.2.{name}"
            assert engine.get_weights_by_name(name, 6) == stored[name][:6].tolist()
        engine.update_weights_from_tensor(load_file(first / "model.safetensors"))
        engine.release_memory_occupation(["kv_cache"])
        engine.resume_memory_occupation()
        assert_equals(engine, references[0])
        with WeightSender([(engine, 2)]) as sender:
            sender.send(fused.items(), weight_version="fused")
        assert engine.get_server_info()["weight_version"] == "fused"
        assert_equals(engine, references[1])
        engine.release_memory_occupation()
        engine.resume_memory_occupation(["weights"])
        engine.update_weights_from_disk(str(first))
        engine.resume_memory_occupation(["kv_cache"])
        assert_equals(engine, references[0])
