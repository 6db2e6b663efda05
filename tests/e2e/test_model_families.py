"""Every family's tokens, log-probabilities and routes against `transformers`, in float32, on tiny random checkpoints.

Equality under the near-tie rule, as in `test_reference_equality.py`, which has the settings; here one of them is run for
each family, with tensor- or with data-parallel attention, and the others by `make test-matrix`.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.reference_equality import Request, Setting, ask, compare, make_engine
from support.tiny_families import FAMILIES, make_family_model, pack_experts, unpack_experts, write_family

from waybill import Engine
from waybill.engine.routing.transformers_reference import Reference
from waybill.engine.weight_sync.checksum import checksum

ALWAYS = [
    Setting(2, "tp", 16, cache=True, retract=True, depth=1),
    Setting(1, "ep", 64, cache=True, retract=False, depth=1, dp=2),
]
# The others have something in attention that tensor parallelism cuts.
UNDER_DP = {"qwen3_moe", "mixtral", "glm4_moe", "kimi_k2"}
MATRIX = [
    Setting(1, "ep", -1, cache=False, retract=False, depth=0),
    Setting(1, "ep", 7, cache=True, retract=True, depth=1, attention="torch_reference"),
    Setting(2, "ep", 7, cache=True, retract=True, depth=1),
    Setting(2, "tp", -1, cache=False, retract=False, depth=0),
    Setting(2, "ep", -1, cache=True, retract=False, depth=1, attention="torch_reference"),
    Setting(1, "tp", 16, cache=True, retract=True, depth=1, dp=2),
    Setting(1, "ep", 16, cache=True, retract=True, depth=1, dp=2, dispatcher="all_to_all"),
    Setting(2, "ep", 16, cache=True, retract=False, depth=1, dp=2),
    Setting(2, "ep", 16, cache=True, retract=False, depth=0, dp=2, dispatcher="all_to_all"),
]
# Retraction is forced: some answers are so long that together they outgrow the pool.
NUM_LONG_ANSWERS, LONG_ANSWER_TOKENS = 4, 60
ROOMY_POOL_TOKENS, TIGHT_POOL_TOKENS = 4096, 240


def make_requests(setting: Setting) -> list[Request]:
    """Prompts shorter and longer than pages, chunks and windows; some share a prefix. Of two dp ranks the last has most."""
    rng = random.Random(0)
    shared = [rng.randrange(256) for _ in range(40)]
    prompts = [[rng.randrange(256) for _ in range(length)] for length in (1, 2, 16, 33, 45, 90)]
    prompts += [shared + [rng.randrange(256) for _ in range(length)] for length in (3, 9)]
    ranks = [int(index < len(prompts) - 2) if setting.dp > 1 else None for index in range(len(prompts))]
    lengths = [LONG_ANSWER_TOKENS if setting.retract and i < NUM_LONG_ANSWERS else 8 for i in range(len(prompts))]
    return [Request(*each) for each in zip(prompts, lengths, ranks, strict=True)]


def settings_to_run() -> Iterator[Any]:
    for family in FAMILIES:
        for setting in ALWAYS + MATRIX:
            marks = [] if setting == ALWAYS[int(family in UNDER_DP)] else [pytest.mark.matrix]
            yield pytest.param(family, setting, id=f"{family}-{setting}", marks=marks)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Made when they are first asked for."""

    class Checkpoints(dict[str, Path]):
        def __missing__(self, family: str) -> Path:
            self[family] = write_family(family, tmp_path_factory.mktemp(family))
            return self[family]

    return Checkpoints()


@pytest.fixture(scope="module")
def references(checkpoints: dict[str, Path]) -> dict[str, Reference]:
    class References(dict[str, Reference]):
        def __missing__(self, family: str) -> Reference:
            self[family] = Reference(str(checkpoints[family]), num_kept=64)
            return self[family]

    return References()


@pytest.mark.matrix
def test_experts_in_mxfp4_equal_the_same_in_float32(tmp_path: Path) -> None:
    """A rank's columns begin within a group of 32 that has one scale. New ones come as files, too."""
    folder = write_family("gpt_oss", tmp_path / "packed")
    pack_experts(folder)
    unpack_experts(Path(shutil.copytree(folder, tmp_path / "plain")))
    setting = Setting(2, "tp", 16, cache=True, retract=False, depth=1)
    requests = make_requests(setting)
    with make_engine(folder, setting, ROOMY_POOL_TOKENS, context_length=200) as engine:
        answers = ask(engine, requests)
        torch.manual_seed(5)
        pack_experts(write_family("gpt_oss", tmp_path / "new"))
        engine.update_weights_from_disk(str(tmp_path / "new"))
        engine.flush_cache()
        answers_of_new = ask(engine, requests)
    unpack_experts(tmp_path / "new")
    for folder, found in ((tmp_path / "plain", answers), (tmp_path / "new", answers_of_new)):
        print(compare(Reference(str(folder)), requests, found))


ON_GPU = [
    Setting(1, "ep", 16, cache=True, retract=True, depth=1),
    Setting(2, "tp", 16, cache=True, retract=True, depth=1),
    Setting(2, "ep", -1, cache=True, retract=False, depth=1),
    Setting(1, "ep", 16, cache=True, retract=True, depth=1, dp=2),
]


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("setting", ON_GPU, ids=str)
def test_equals_transformers_on_gpu(family: str, setting: Setting, tmp_path: Path) -> None:
    if torch.cuda.device_count() < setting.dp * setting.tp:
        pytest.skip(f"needs {setting.dp * setting.tp} CUDA devices")
    folder = write_family(family, tmp_path)
    check_equality(family, setting, folder, Reference(str(folder), "cuda", num_kept=64), tmp_path, "cuda")


@pytest.mark.parametrize(("family", "setting"), list(settings_to_run()))
def test_equals_transformers(
    family: str, setting: Setting, checkpoints: dict[str, Path], references: dict[str, Reference], tmp_path: Path
) -> None:
    check_equality(family, setting, checkpoints[family], references[family], tmp_path, "cpu")


# Up to eight ranks: fewer kv heads than ranks, an expert a rank, slices of a few columns.
MANY_RANKS = [
    Setting(4, "ep", 16, cache=True, retract=False, depth=1),
    Setting(8, "tp", 16, cache=True, retract=True, depth=1),
    Setting(8, "ep", 16, cache=True, retract=False, depth=1),
    Setting(1, "ep", 16, cache=True, retract=False, depth=1, dp=8),
    Setting(1, "ep", 16, cache=True, retract=False, depth=1, dp=4, dispatcher="all_to_all"),
    Setting(2, "tp", 16, cache=True, retract=True, depth=1, dp=4),
    Setting(4, "ep", 16, cache=True, retract=False, depth=1, dp=2),
]


@pytest.mark.matrix
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("setting", MANY_RANKS, ids=str)
def test_equals_transformers_on_many_ranks(family: str, setting: Setting, tmp_path: Path) -> None:
    """Eight query heads; of kv heads two, but for latents, whose heads have keys and values each."""
    num_kv_heads = 8 if "kv_lora_rank" in FAMILIES[family]().to_dict() else 2
    changes = {"num_attention_heads": 8, "num_key_value_heads": num_kv_heads}
    folder = write_family(family, tmp_path / "first", **changes)
    check_equality(family, setting, folder, Reference(str(folder), num_kept=64), tmp_path / "new", "cpu", **changes)


def check_equality(
    family: str, setting: Setting, folder: Path, reference: Reference, tmp_path: Path, device: str, **changes: int
) -> None:
    """`tmp_path` is where another checkpoint may be written, with the same `changes` of the family's configuration."""
    requests = make_requests(setting)
    pool_tokens = TIGHT_POOL_TOKENS if setting.retract else ROOMY_POOL_TOKENS
    with make_engine(folder, setting, pool_tokens, device, context_length=200) as engine:
        answers = ask(engine, requests)
        if setting.cache:
            again = ask(engine, requests[-1:])
            assert again[0]["meta_info"]["cached_tokens"] > 0
            answers, requests = answers + again, requests + requests[-1:]
        state = engine.get_server_info()
        if setting in ALWAYS or changes:
            check_update(engine, family, tmp_path, as_files=setting.dp > 1, **changes)
    assert (state["num_retractions"] > 0) == setting.retract
    print(f"{family} {setting}: {compare(reference, requests, answers)}")


def check_update(engine: Engine, family: str, folder: Path, *, as_files: bool, **changes: int) -> None:
    """Other weights, from a folder by the names on the hub, or from memory by those of `transformers` there."""
    write_family(family, folder, seed=1, **changes)
    stored = load_file(folder / "model.safetensors")
    if as_files:
        engine.update_weights_from_disk(str(folder))
    else:
        # Copies: tied or sliced tensors cannot be sent as they are.
        in_memory = make_family_model(family, seed=1, **changes).state_dict()
        engine.update_weights_from_tensor({name: tensor.clone() for name, tensor in in_memory.items()})
    sums = engine.checksum_weights()
    # A checkpoint may have layers that draft tokens.
    assert sums == {name: checksum(stored[name]) for name in sums}
    for name in (min(sums), max(sums)):
        assert np.array_equal(engine.get_weights_by_name(name, 3), stored[name][:3].numpy())
    requests = [Request([5, 6, 7] * 9, 4)]
    compare(Reference(str(folder)), requests, ask(engine, requests))
