"""A checkpoint folder in another format than the engine's is refused by name, whatever its tensors are called."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from waybill.engine.models.registry import check_update_format

from .test_receiver import Trainer, load


@pytest.fixture
def trainer() -> Iterator[Trainer]:
    trainer = Trainer()
    yield trainer
    trainer.pool.shutdown()


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("quantisation", "words"),
    [
        (FP8, r"quantization_config\.quant_method='fp8'"),
        ({"quant_method": "gptq", "bits": 4}, r"quantization_config\.quant_method='gptq'"),
        ("fp8", "quantization_config: must be an object"),
        (None, None),
    ],
)
def test_a_folder_in_another_format_is_refused(
    trainer: Trainer, tmp_path: Path, quantisation: Any, words: str | None
) -> None:
    """Though its tensors have the model's names and shapes."""
    tensors, before = trainer.tensors(1), trainer.sums()
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"model_type": "qwen3_moe", "quantization_config": quantisation}
    (tmp_path / "config.json").write_text(json.dumps(config))
    trainer.receiver._config = dataclasses.replace(trainer.receiver._config, model_type="qwen3_moe")
    outcome = load(trainer, tmp_path, whole=True)
    assert outcome.success == (words is None)
    if words is not None:
        assert re.search(f"{words}.*; the engine was started with weights in floating point", outcome.message)
        assert outcome.message.endswith("nothing was changed") and trainer.sums() == before


@pytest.mark.parametrize(("field", "value"), [("weight_block_size", [64, 64]), ("scale_fmt", "ue8m0")])
def test_fp8_of_another_kind_is_refused(trainer: Trainer, tmp_path: Path, field: str, value: Any) -> None:
    loaded = dataclasses.replace(trainer.receiver._config, model_type="qwen3_moe", is_fp8=True)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "qwen3_moe", "quantization_config": FP8}))
    check_update_format(str(tmp_path), loaded)
    file.write_text(json.dumps({"model_type": "qwen3_moe", "quantization_config": FP8 | {field: value}}))
    with pytest.raises(ValueError, match=rf"quantization_config\.{field}=.*started with weights in block FP8"):
        check_update_format(str(tmp_path), loaded)
