"""Memory that is given back and taken again, and weights that are read back."""

from __future__ import annotations

import pytest
import torch
from support.weight_updates import PROMPTS, Recording, Tensors, answers, assert_serves

from waybill import Engine


def test_memory_is_given_back_and_taken_again(engine: Engine, checkpoint: str, base: Tensors) -> None:
    started = answers(engine)
    recording = Recording(engine, PROMPTS[0], 200, 2)
    with pytest.raises(RuntimeError, match="only when nothing runs or waits"):
        engine.release_memory_occupation()
    recording.finish()
    with pytest.raises(RuntimeError, match="tags: 'colour' must be one of"):
        engine.release_memory_occupation(["colour"])
    engine.release_memory_occupation(["kv_cache"])
    with pytest.raises(RuntimeError, match="memory: kv_cache is released"):
        engine.generate(input_ids=[1])
    engine.resume_memory_occupation()
    assert_serves(engine, base, started)
    engine.release_memory_occupation()
    for refused in (
        lambda: engine.generate(input_ids=[1]),
        lambda: engine.get_weights_by_name("model.norm.weight"),
        engine.checksum_weights,
        engine.continue_generation,
        lambda: engine.update_weights_from_disk(checkpoint),
    ):
        with pytest.raises(RuntimeError, match="memory: kv_cache, weights is released"):
            refused()
    engine.resume_memory_occupation(["weights"])
    with pytest.raises(RuntimeError, match="is_last: an earlier update did not end"):
        engine.update_weights_from_tensor({"model.norm.weight": base["model.norm.weight"]}, is_last=True)
    engine.update_weights_from_disk(checkpoint)
    engine.resume_memory_occupation(["kv_cache"])
    assert_serves(engine, base, started)


def test_weights_are_read_back(engine: Engine, base: Tensors) -> None:
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.2.mlp.experts.9.down_proj.weight"):
        assert engine.get_weights_by_name(name, 5) == base[name][:5].float().tolist()
    fused = engine.get_weights_by_name("model.layers.2.mlp.experts.gate_up_proj", 9)
    expected = [
        torch.cat([base[f"model.layers.2.mlp.experts.{e}.{part}_proj.weight"] for part in ("gate", "up")])
        for e in range(9)
    ]
    assert fused == torch.stack(expected).float().tolist()
    with pytest.raises(RuntimeError, match=r"the model has no 'model\.colour'"):
        engine.get_weights_by_name("model.colour")
