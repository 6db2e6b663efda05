"""The checkpoints with random weights: stock `transformers` loads and runs them, and their routing is a fair load."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from waybill.engine.config import EngineConfig
from waybill.engine.models.model_context import ModelContext
from waybill.engine.models.registry import build_model, load_model_config
from waybill.engine.routing.hf_config import read_hf_config
from waybill.parallel.mesh import ParallelMesh

SCRIPT = Path(__file__).parents[3] / "bench" / "make_models.py"


@pytest.fixture(scope="module")
def make_models() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_models", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(make_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("T")
    make_models.write_checkpoint("T", out, seed=0)
    return out


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                assert index[name] == path.name
                assert name not in tensors
                tensors[name] = file.get_tensor(name)
    assert tensors.keys() == index.keys()
    return tensors


def test_transformers_loads_and_runs_the_toy(checkpoint: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    ids = torch.randint(0, 512, (1, 200), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        output = model.eval()(ids, output_router_logits=True, use_cache=False)
    assert output.logits.shape == (1, 200, 512)
    # A logit's deviation is 1 by construction; weights of a wrong scale show here first.
    assert 0.5 < output.logits.std().item() < 2.0
    assert len(output.router_logits) == 3
    for logits in output.router_logits:
        used = torch.bincount(logits.topk(2, dim=-1).indices.flatten(), minlength=8)
        assert used.min().item() > 0
        second, third = logits.topk(3, dim=-1).values[:, 1:].unbind(-1)
        assert (second - third).median().item() > 0.05


def test_names_are_those_of_the_hub(checkpoint: Path) -> None:
    tensors = read_tensors(checkpoint)
    assert tensors["model.layers.1.mlp.experts.7.down_proj.weight"].shape == (64, 32)
    assert tensors["model.layers.1.mlp.gate.weight"].shape == (8, 64)
    assert tensors["model.layers.0.mlp.gate_proj.weight"].shape == (96, 64)
    assert "model.layers.0.mlp.gate.weight" not in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_the_tokenizer_serves_the_whole_vocabulary(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = "start with 12 é 漢"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    # Random weights sample ids beyond the tokenizer's; they stand for nothing and must not break decoding.
    assert tokenizer.decode([72, 105, 511]) == "Hi"


def test_small_shards_hold_the_same_tensors(
    make_models: ModuleType, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_models, "SHARD_BYTES", 100_000)
    make_models.write_checkpoint("T", tmp_path, seed=0)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[-1].name == f"model-{len(shards):05d}-of-{len(shards):05d}.safetensors"
    # Headers aside, a shard keeps to its limit.
    assert max(path.stat().st_size for path in shards) < 120_000
    whole, split = read_tensors(checkpoint), read_tensors(tmp_path)
    assert whole.keys() == split.keys()
    assert all(torch.equal(whole[name], split[name]) for name in whole)


def test_the_seed_decides_the_weights(make_models: ModuleType, checkpoint: Path, tmp_path: Path) -> None:
    make_models.write_checkpoint("T", tmp_path, seed=1)
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    assert not torch.equal(read_tensors(checkpoint)[name], read_tensors(tmp_path)[name])


@pytest.mark.parametrize(
    ("shape", "low", "high", "routing"),
    [("M", 1.6e9, 1.8e9, (16, 64, 8)), ("routing30b", 1e6, 1e7, (48, 128, 8))],
)
def test_sizes_of_the_named_shapes(
    make_models: ModuleType, shape: str, low: float, high: float, routing: tuple[int, int, int]
) -> None:
    config = make_models.make_config(shape)
    assert low < sum(math.prod(s) for _, s in make_models.tensor_shapes(config)) < high
    assert (config.num_hidden_layers, config.num_experts, config.num_experts_per_tok) == routing
    assert len(config.mlp_only_layers) == 0


@pytest.mark.parametrize(
    ("shape", "low", "high", "routing"),
    [
        ("moonlight", 15.5e9, 16.5e9, (27, 64, 6)),
        ("kimik2", 1.02e12, 1.03e12, (61, 384, 8)),
        ("moonlight2", 0.6e9, 0.8e9, (2, 64, 6)),
        ("kimik2_2", 17e9, 19e9, (2, 384, 8)),
    ],
)
def test_sizes_of_shapes_with_latents(
    make_models: ModuleType, shape: str, low: float, high: float, routing: tuple[int, int, int]
) -> None:
    config = make_models.make_config(shape)
    assert low < sum(math.prod(s) for _, s in make_models.tensor_shapes(config)) < high
    assert (config.num_hidden_layers, config.n_routed_experts, config.num_experts_per_tok) == routing


TOYS = {
    "toymoonlight": "deepseek_v3",
    "toykimik2": "kimi_k2",
    "toyglm4.5air": "glm4_moe",
    "toygptoss20b": "gpt_oss",
}


@pytest.mark.parametrize("shape", TOYS)
def test_toys_of_other_families_are_read_by_transformers_and_by_the_engine(
    make_models: ModuleType, shape: str, tmp_path: Path
) -> None:
    make_models.write_checkpoint(shape, tmp_path, seed=0)
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, config=read_hf_config(str(tmp_path)), dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.inference_mode():
        logits = model.eval()(torch.arange(100)[None]).logits
    assert 0.5 < logits.std().item() < 2.0
    config = load_model_config(EngineConfig(model_path=str(tmp_path)))
    assert config.model_type == TOYS[shape]
    loaded = build_model(ModelContext(config, ParallelMesh.single(torch.device("cpu"))), 128)
    assert loaded.sharded_weights().keys() == {name for name, _ in make_models.tensor_shapes(model.config)}


@pytest.mark.parametrize(
    ("shape", "low", "high", "routing"),
    [
        ("glm4.5air", 106e9, 107e9, (46, 128, 8)),
        ("gptoss20b", 20.5e9, 21.5e9, (24, 32, 4)),
        ("glm4.5air2", 2.5e9, 3.5e9, (2, 128, 8)),
        ("gptoss20b_2", 1.5e9, 2e9, (2, 32, 4)),
    ],
)
def test_sizes_of_shapes_of_other_families(
    make_models: ModuleType, shape: str, low: float, high: float, routing: tuple[int, int, int]
) -> None:
    config = make_models.make_config(shape)
    assert low < sum(math.prod(s) for _, s in make_models.tensor_shapes(config)) < high
    assert (config.num_hidden_layers, config.num_local_experts, config.num_experts_per_tok) == routing


def test_routing30b_reaches_the_context_of_its_model(make_models: ModuleType) -> None:
    assert make_models.make_config("routing30b").max_position_embeddings == 40960
