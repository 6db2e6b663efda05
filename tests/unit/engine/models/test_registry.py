"""How a `model_type` finds its model file."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from waybill.engine.config import EngineConfig
from waybill.engine.models.model_config import ModelConfig, resolve_dtype
from waybill.engine.models.registry import FAMILIES, family_of, load_model_config
from waybill.launch.args import EMBEDDED_MODEL

ENGINE = Path(__file__).parents[4] / "engine"


def test_an_unknown_model_type_is_refused_with_those_that_work(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"model_type='llama': must be one of deepseek_v3, .*qwen3_moe"):
        load_model_config(EngineConfig(model_path=str(tmp_path)))


def test_every_family_is_found_by_its_name() -> None:
    assert all(family_of(name) is family for name, family in FAMILIES.items())


def test_only_the_registry_knows_model_files() -> None:
    """What serves a model outside `engine/models` knows the protocol, not the classes."""
    outside = [path for path in ENGINE.rglob("*.py") if path.parent != ENGINE / "models"]
    assert outside
    for path in outside:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                names = {*(node.module or "").split("."), *(alias.name for alias in node.names)}
                assert not names & FAMILIES.keys(), f"{path} names a model file"


def test_a_configuration_travels_whole_and_its_faults_name_the_field() -> None:
    """One rank reads it and sends it to the others."""
    config = load_model_config(EngineConfig(model_path=str(EMBEDDED_MODEL)))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=ModelConfig) == config
    assert config.dtype is torch.bfloat16
    with pytest.raises(ValueError, match="dtype: the checkpoint's is float64, must be one of float32, bfloat16"):
        resolve_dtype("auto", torch.float64)


def test_a_rank_imports_no_transformers_before_it_must() -> None:
    script = "import sys, waybill.launch.worker; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
