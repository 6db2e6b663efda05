"""A Qwen3-MoE checkpoint in block FP8, at tp 2 with slices that cut its blocks: answers of the dequantised weights, slices
of routes, and updates of the weights. Activations are exact, as on a CPU by default."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import fp8_checkpoint, tiny_families
from support.reference_equality import Request, Setting, ask, compare, make_engine

from waybill import Engine
from waybill.engine.routing.transformers_reference import Reference
from waybill.engine.weight_sync.checksum import checksum
from waybill.engine.weight_sync.delta_sender import DeltaSender, MemorySender
from waybill.engine.weight_sync.sender import WeightSender
from waybill.parallel.fp8 import quantise_blocks

ALWAYS = Setting(2, "tp", 16, cache=True, retract=False, depth=1)
MATRIX = [
    Setting(1, "ep", -1, cache=True, retract=True, depth=1),
    Setting(2, "ep", 16, cache=True, retract=True, depth=1),
    Setting(1, "tp", 16, cache=True, retract=True, depth=1, dp=2),
    Setting(1, "ep", 16, cache=True, retract=False, depth=1, dp=2, dispatcher="all_to_all"),
]
# Slices of 24 columns, five of which and a part of one are a block.
MANY_RANKS = [
    Setting(4, "ep", 16, cache=True, retract=False, depth=1),
    Setting(8, "tp", 16, cache=True, retract=False, depth=1),
    Setting(2, "tp", 16, cache=True, retract=False, depth=1, dp=4),
]
MATRIX_NAME = "model.layers.2.mlp.experts.5.up_proj.weight"


@dataclass(frozen=True)
class Folders:
    """Checkpoints of two models, before and after they were quantised."""

    plain: list[Path]
    fp8: list[Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    plain = [fp8_checkpoint.write_plain(tmp_path_factory.mktemp("plain"), seed) for seed in range(2)]
    return Folders(plain, [fp8_checkpoint.quantise(each, tmp_path_factory.mktemp("fp8")) for each in plain])


@pytest.fixture(scope="module")
def references(folders: Folders) -> list[Reference]:
    return [Reference(str(folder), num_kept=64) for folder in folders.fp8]


@pytest.fixture(scope="module")
def engine(folders: Folders) -> Iterator[Engine]:
    with make_engine(folders.fp8[0], ALWAYS, 4096, context_length=200) as started:
        yield started


def make_requests(dp: int = 1) -> list[Request]:
    prompts = [[(7 * i + length) % 250 for i in range(length)] for length in (1, 2, 16, 33, 90)]
    return [Request(prompt, 40, index % dp if dp > 1 else None) for index, prompt in enumerate(prompts)]


def test_equals_transformers_with_the_dequantised_weights(engine: Engine, references: list[Reference]) -> None:
    requests = make_requests()
    compare(references[0], requests, ask(engine, requests))
    again = ask(engine, requests)
    assert again[-1]["meta_info"]["cached_tokens"] > 0
    compare(references[0], requests, again)


@pytest.mark.matrix
@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
@pytest.mark.parametrize("setting", [ALWAYS, *MATRIX], ids=str)
def test_other_families(family: str, setting: Setting, tmp_path: Path) -> None:
    folder = fp8_checkpoint.quantise(tiny_families.write_family(family, tmp_path / "plain"), tmp_path / "fp8")
    requests = make_requests(setting.dp)
    with make_engine(folder, setting, 150 if setting.retract else 4096, context_length=140) as engine:
        compare(Reference(str(folder), num_kept=64), requests, ask(engine, requests))


@pytest.mark.matrix
@pytest.mark.parametrize("setting", MATRIX, ids=str)
def test_in_other_layouts(setting: Setting, folders: Folders, references: list[Reference]) -> None:
    requests = make_requests(setting.dp)
    with make_engine(folders.fp8[0], setting, 150 if setting.retract else 4096, context_length=140) as engine:
        compare(references[0], requests, ask(engine, requests))


@pytest.mark.matrix
@pytest.mark.parametrize("setting", MANY_RANKS, ids=str)
def test_on_many_ranks(setting: Setting, tmp_path: Path) -> None:
    plain = fp8_checkpoint.write_plain(tmp_path / "plain", num_attention_heads=8)
    folder = fp8_checkpoint.quantise(plain, tmp_path / "fp8")
    requests = make_requests(setting.dp)
    with make_engine(folder, setting, 4096, context_length=140) as engine:
        compare(Reference(str(folder), num_kept=64), requests, ask(engine, requests))


ON_GPU = [
    ALWAYS,
    Setting(1, "ep", 16, cache=True, retract=True, depth=1),
    Setting(1, "ep", 16, cache=True, retract=True, depth=1, dp=2),
    Setting(1, "tp", 16, cache=True, retract=False, depth=1, dp=2),
]


@pytest.mark.gpu
@pytest.mark.parametrize("family", [fp8_checkpoint.NAME, "deepseek_v3", "glm4_moe"])
@pytest.mark.parametrize("setting", ON_GPU, ids=str)
def test_equals_transformers_on_gpu(family: str, setting: Setting, tmp_path: Path) -> None:
    """Of activations that are exact; that those in e4m3 are rounded as their twin does is tested by itself."""
    if torch.cuda.device_count() < setting.dp * setting.tp:
        pytest.skip(f"needs {setting.dp * setting.tp} CUDA devices")
    if family != fp8_checkpoint.NAME and (setting.tp > 1 or setting.split == "tp"):
        pytest.skip("its slices are narrower than a product of e4m3 numbers")
    tiny_families.FAMILIES.setdefault(fp8_checkpoint.NAME, fp8_checkpoint.make_config)
    folder = fp8_checkpoint.quantise(tiny_families.write_family(family, tmp_path / "plain"), tmp_path / "fp8")
    requests = make_requests(setting.dp)
    options = {"context_length": 140, "fp8_activations": "exact"}
    with make_engine(folder, setting, 150 if setting.retract else 4096, "cuda", **options) as engine:
        answers = ask(engine, requests)
    print(compare(Reference(str(folder), "cuda", num_kept=64), requests, answers))


def rows_of(answer: dict[str, Any]) -> np.ndarray:
    found: np.ndarray = answer["meta_info"]["routed_experts"]
    return found


def generate(engine: Engine, prompt: list[int], **options: Any) -> dict[str, Any]:
    params = {"temperature": 0.0, "max_new_tokens": 6, "ignore_eos": True}
    answer: dict[str, Any] = engine.generate(
        input_ids=prompt, sampling_params=params, return_routed_experts=True, **options
    )
    return answer


def test_slices_of_routes(engine: Engine) -> None:
    prompt = [(5 * i) % 250 for i in range(37)]
    full = rows_of(generate(engine, prompt))
    assert len(full) == len(prompt) + 5
    for start in (0, 9, len(prompt)):
        answer = generate(engine, prompt, routed_experts_start_len=start)
        assert rows_of(answer).tobytes() == full[start:].tobytes()
    assert answer["meta_info"]["cached_tokens"] > 0
    num_steps = engine.get_server_info()["num_steps"]
    with pytest.raises(ValueError, match="routed_experts_start_len=38 is higher than the number of input tokens"):
        generate(engine, prompt, routed_experts_start_len=len(prompt) + 1)
    assert engine.get_server_info()["num_steps"] == num_steps, "refused before any prefill"


def assert_is_model(engine: Engine, reference: Reference) -> None:
    engine.flush_cache()
    requests = make_requests()[:3]
    compare(reference, requests, ask(engine, requests))


def test_updates_in_fp8_and_in_floating_point(engine: Engine, folders: Folders, references: list[Reference]) -> None:
    """All ways give the bits that the checkpoint of the same model has."""
    plain = [load_file(folder / "model.safetensors") for folder in folders.plain]
    stored = [load_file(folder / "model.safetensors") for folder in folders.fp8]
    expected = [{name: checksum(each) for name, each in tensors.items()} for tensors in stored]
    assert engine.checksum_weights() == expected[0]
    engine.update_weights_from_tensor(plain[1], weight_version="floats")
    assert engine.checksum_weights() == expected[1]
    assert_is_model(engine, references[1])
    engine.update_weights_from_disk(str(folders.fp8[0]))
    assert engine.checksum_weights() == expected[0]
    engine.update_weights_from_disk(str(folders.plain[1]))
    assert engine.checksum_weights() == expected[1]
    # A sender that casts leaves numbers with a scale as they are, and their scales.
    with WeightSender([(engine, 2)], dtype=torch.bfloat16) as casting:
        casting.send(stored[0].items(), weight_version="cast")
    matrices = [name for name in expected[0] if f"{name}_scale_inv" in expected[0]]
    found = engine.checksum_weights()
    assert all(found[each] == expected[0][each] for name in matrices for each in (name, f"{name}_scale_inv"))
    with WeightSender([(engine, 2)]) as sender:
        sender.send(stored[0].items(), weight_version="as they are")
        assert engine.checksum_weights() == expected[0]
        sender.send(plain[1].items(), weight_version="floats")
    assert engine.checksum_weights() == expected[1]
    updates = DeltaSender(MemorySender([engine]))
    updates.send(stored[1].items(), weight_version="whole")
    changed = {name: tensor.clone() for name, tensor in stored[1].items()}
    changed[MATRIX_NAME][3:90:7, ::11] = stored[0][MATRIX_NAME][3:90:7, ::11]
    changed[f"{MATRIX_NAME}_scale_inv"][:, 1] *= 2
    updates.send(changed.items(), weight_version="numbers and scales")
    assert engine.checksum_weights() == {name: checksum(each) for name, each in changed.items()}
    updates.send(stored[1].items(), weight_version="and back")
    in_floats = DeltaSender(MemorySender([engine]))
    in_floats.send(plain[1].items(), weight_version="floats")
    with pytest.raises(RuntimeError, match="the engine keeps it in float8_e4m3fn, so its values in float32"):
        in_floats.send(plain[1].items(), weight_version="floats, one by one")
    rows = engine.get_weights_by_name(f"{MATRIX_NAME}_scale_inv", 2)
    assert rows == stored[1][f"{MATRIX_NAME}_scale_inv"][:2].tolist()
    assert engine.get_weights_by_name(MATRIX_NAME, 2) == stored[1][MATRIX_NAME][:2].float().tolist()
    engine.release_memory_occupation()
    engine.resume_memory_occupation(["weights"])
    engine.update_weights_from_disk(str(folders.fp8[0]))
    engine.resume_memory_occupation(["kv_cache"])
    assert_is_model(engine, references[0])


def test_what_would_be_wrong_numbers_is_refused(engine: Engine, folders: Folders) -> None:
    before = engine.checksum_weights()
    data, scales = quantise_blocks(torch.ones(192, 224))
    for tensors, words in (
        ({MATRIX_NAME: data}, "must come in the same update"),
        ({f"{MATRIX_NAME}_scale_inv": scales}, "must come in the same update"),
        ({MATRIX_NAME: data.to(torch.float8_e5m2)}, "e5m2|E5M2"),
        ({"model.norm.weight": torch.ones(224).to(data.dtype)}, "float8_e4m3fn"),
        ({MATRIX_NAME: torch.ones(192, 224), f"{MATRIX_NAME}_scale_inv": scales}, "both bring"),
        ({f"{MATRIX_NAME}_scale_inv": scales[:1]}, "shape"),
    ):
        with pytest.raises(RuntimeError, match=words):
            engine.update_weights_from_tensor(tensors, is_last=True)
        assert engine.checksum_weights() == before
    # Of one tensor alone, the others keep their values.
    engine.update_weights_from_tensor({MATRIX_NAME: torch.ones(192, 224)}, is_last=True)
    after = engine.checksum_weights()
    assert {name for name in after if after[name] != before[name]} == {MATRIX_NAME, f"{MATRIX_NAME}_scale_inv"}
