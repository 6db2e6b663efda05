"""A tiny Qwen3-MoE checkpoint in block FP8, as the hub has them. Two ranks' slices of its experts end inside of blocks."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from transformers import Qwen3MoeConfig

from support import tiny_families

SCRIPT = Path(__file__).parents[2] / "bench" / "quantise_fp8.py"
SIZES = tiny_families.SIZES | {"hidden_size": 224, "intermediate_size": 192}
NAME = "qwen3_moe_of_blocks"


def make_config() -> Qwen3MoeConfig:
    return Qwen3MoeConfig(**SIZES, num_experts=8, moe_intermediate_size=192, head_dim=32, mlp_only_layers=[0])


def write_plain(folder: Path, seed: int = 0, **changes: int) -> Path:
    """The model before it is quantised; `changes` of its configuration."""
    tiny_families.FAMILIES.setdefault(NAME, make_config)
    return tiny_families.write_family(NAME, folder, seed, **changes)


def quantise(plain: Path, out: Path) -> Path:
    spec = importlib.util.spec_from_file_location("quantise_fp8", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.quantise_checkpoint(plain, out)
    return out
