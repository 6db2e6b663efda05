"""How a `model_type` finds its model file."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from waybill.engine.config import EngineConfig
from waybill.engine.models.registry import FAMILIES, family_of, load_model_config

ENGINE = Path(__file__).parents[4] / "engine"


def test_an_unknown_model_type_is_refused_with_those_that_work(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="model_type='llama': must be one of qwen3_moe"):
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
