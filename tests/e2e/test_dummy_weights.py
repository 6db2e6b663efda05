"""`load_format="dummy"`: an engine without a checkpoint, alike in every layout, until an update brings weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from waybill import Engine
from waybill.engine.weight_sync.checksum import checksum

PROMPTS = [[i + 1] * 20 for i in range(4)]
GREEDY = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}
OPTIONS = {"dtype": "float32", "kv_cache_tokens": 2048}


def tokens(engine: Engine) -> list[list[int]]:
    return [answer["output_ids"] for answer in engine.generate(input_ids=PROMPTS, sampling_params=GREEDY)]


def test_random_weights_are_alike_in_every_layout_and_give_way_to_an_update(checkpoint: str, tmp_path: Path) -> None:
    for file in Path(checkpoint).iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path)
    stored = load_file(f"{checkpoint}/model.safetensors")
    with Engine(str(tmp_path), tp_size=1, load_format="dummy", **OPTIONS) as engine:
        random = tokens(engine)
    with Engine(str(tmp_path), tp_size=2, load_format="dummy", **OPTIONS) as engine:
        assert tokens(engine) == random
        with pytest.raises(RuntimeError, match=r"weights: they are random \(load_format='dummy'\)"):
            engine.checksum_weights()
        engine.update_weights_from_tensor(stored)
        found = engine.checksum_weights()
        assert found == {name: checksum(stored[name].float()) for name in found}
        assert tokens(engine) != random
