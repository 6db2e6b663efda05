"""MXFP4 as `transformers` dequantises it, and read by rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_families import pack_experts, write_family
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from waybill.engine.config import EngineConfig
from waybill.engine.models.checkpoint import Checkpoint, check_tensors
from waybill.engine.models.model_context import ModelContext
from waybill.engine.models.mxfp4 import dequantise
from waybill.engine.models.registry import build_model, load_model_config
from waybill.engine.models.weight_loader import load_weights
from waybill.parallel.mesh import Axis, ParallelMesh

CPU = torch.device("cpu")


def mesh_of(rank: int, size: int) -> ParallelMesh:
    axes = [Axis(name, rank, size, None, tuple(range(size))) for name in ("world", "tp", "ep", "node")]
    return ParallelMesh(CPU, axes[0], Axis.single("dp"), *axes[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_those_of_transformers(dtype: torch.dtype) -> None:
    """Of all bytes and of exponents that leave them normal."""
    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (2, 5, 3, 16), dtype=torch.uint8)
    scales = torch.randint(20, 240, (2, 5, 3), dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    assert torch.equal(dequantise(blocks, scales).transpose(1, 2).to(dtype), expected)


@pytest.mark.parametrize(("size", "split"), [(1, "ep"), (2, "ep"), (2, "tp")])
def test_every_rank_has_its_part(tmp_path: Path, size: int, split: str) -> None:
    """Also where its columns begin within a group of 32: half of 96 do."""
    folder = write_family("gpt_oss", tmp_path)
    pack_experts(folder)
    stored = load_file(folder / "model.safetensors")
    config = load_model_config(EngineConfig(model_path=str(folder), dtype="bfloat16"))
    name = "model.layers.1.mlp.experts"
    for rank in range(size):
        model = build_model(ModelContext(config, mesh_of(rank, size), split), 8)
        weights, checkpoint = model.sharded_weights(), Checkpoint(str(folder))
        check_tensors(weights, checkpoint, model.ignored_weights)
        load_weights(weights, checkpoint, model.ignored_weights, CPU)
        for part in ("gate_up_proj", "down_proj"):
            whole = convert_moe_packed_tensors(stored[f"{name}.{part}_blocks"], stored[f"{name}.{part}_scales"])
            for piece in weights[f"{name}.{part}"].pieces:
                assert torch.equal(piece.storage, whole[piece.index])


def test_what_is_no_mxfp4_is_refused(tmp_path: Path) -> None:
    blocks = torch.zeros(2, 3, 1, 16, dtype=torch.uint8)
    for tensors, message in (
        ({"x_blocks": blocks}, "lacks x_scales, which x_blocks needs"),
        ({"x_blocks": blocks, "x_scales": torch.zeros(2, 3, 2, dtype=torch.uint8)}, "tensor x_blocks: shape .* is no"),
        ({"x_blocks": blocks, "x_scales": torch.zeros(2, 3, 1)}, "tensor x_blocks: shape .* is no MXFP4"),
    ):
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            Checkpoint(str(tmp_path))


def test_a_quantisation_that_is_not_known_is_refused(tmp_path: Path) -> None:
    config = write_family("qwen3_moe", tmp_path) / "config.json"
    config.write_text(config.read_text().replace("{", '{"quantization_config": {"quant_method": "gptq"},', 1))
    with pytest.raises(ValueError, match="quant_method='gptq': must be fp8"):
        load_model_config(EngineConfig(model_path=str(tmp_path)))
