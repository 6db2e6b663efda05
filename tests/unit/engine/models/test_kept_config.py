"""A configuration that was read once is there for the next start, as long as nothing that it follows from has changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.tiny_families import FAMILIES

from waybill.engine.config import EngineConfig
from waybill.engine.models import kept_config
from waybill.engine.models.kept_config import MAX_ENTRIES, load_kept_model_config
from waybill.engine.models.model_config import ModelConfig
from waybill.engine.models.registry import load_model_config


class Readings:
    """The library's part, counted."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, config: EngineConfig) -> ModelConfig:
        self.count += 1
        return load_model_config(config)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "waybill" / "model_configs"


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> Readings:
    readings = Readings()
    monkeypatch.setattr(kept_config, "load_model_config", readings)
    return readings


def write_config(folder: Path, family: str = "qwen3_moe", **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**FAMILIES[family]().to_dict(), "model_type": family, **changes}))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_is_what_was_read(family: str, cache: Path, readings: Readings, tmp_path: Path) -> None:
    config = EngineConfig(model_path=str(write_config(tmp_path / "model", family)))
    first, second = load_kept_model_config(config), load_kept_model_config(config)
    assert first == second == load_model_config(config)
    assert readings.count == 1
    assert len(list(cache.iterdir())) == 1


def test_whatever_it_follows_from_changes_it(cache: Path, readings: Readings, tmp_path: Path) -> None:
    folder = write_config(tmp_path / "model")
    config = EngineConfig(model_path=str(folder))
    whole = load_kept_model_config(config)
    assert load_kept_model_config(EngineConfig(model_path=str(folder), dtype="float16")).dtype_name == "float16"
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert load_kept_model_config(config).eos_token_ids == (7, 9) != whole.eos_token_ids
    write_config(folder, rms_norm_eps=1e-3)
    assert load_kept_model_config(config).rms_norm_eps == 1e-3 != whole.rms_norm_eps
    assert readings.count == 4
    # The same files elsewhere.
    assert load_kept_model_config(EngineConfig(model_path=str(shutil.copytree(folder, tmp_path / "copy")))) is not None
    assert readings.count == 4


def test_other_sources_or_libraries_read_anew(
    cache: Path, readings: Readings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(model_path=str(write_config(tmp_path / "model")))
    load_kept_model_config(config)
    monkeypatch.setattr(kept_config, "version", lambda name: "5.99")
    load_kept_model_config(config)
    monkeypatch.setattr(kept_config, "SOURCES", kept_config.SOURCES[1:])
    load_kept_model_config(config)
    assert readings.count == 3
    assert all(list(kept_config.PACKAGE.glob(pattern)) for pattern in kept_config.SOURCES)


def test_a_refusal_is_not_kept(cache: Path, readings: Readings, tmp_path: Path) -> None:
    config = EngineConfig(model_path=str(write_config(tmp_path / "model")), fp8_activations="e4m3")
    for _ in range(2):
        with pytest.raises(ValueError, match="needs a checkpoint in FP8"):
            load_kept_model_config(config)
    assert readings.count == 2 and not cache.exists()
    assert load_kept_model_config(EngineConfig(model_path=config.model_path)) is not None


def test_a_checkpoint_with_configurations_for_other_versions_is_read_every_time(
    cache: Path, readings: Readings, tmp_path: Path
) -> None:
    config = EngineConfig(model_path=str(write_config(tmp_path / "model", configuration_files=["config.4.0.0.json"])))
    shutil.copy(tmp_path / "model" / "config.json", tmp_path / "model" / "config.4.0.0.json")
    assert load_kept_model_config(config) == load_kept_model_config(config)
    assert readings.count == 2 and not cache.exists()


def test_half_an_entry_and_a_folder_that_cannot_be_written_do_no_harm(
    cache: Path, readings: Readings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(model_path=str(write_config(tmp_path / "model")))
    whole = load_kept_model_config(config)
    (entry,) = cache.iterdir()
    entry.write_bytes(entry.read_bytes()[:-9])
    assert load_kept_model_config(config) == load_kept_model_config(config) == whole
    assert readings.count == 2
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load_kept_model_config(config) == whole


def test_there_are_only_so_many(cache: Path, readings: Readings, tmp_path: Path) -> None:
    folder = write_config(tmp_path / "model")
    config = EngineConfig(model_path=str(folder))
    load_kept_model_config(config)
    for number in range(MAX_ENTRIES):
        (cache / f"{number}.msgpack").touch()
    write_config(folder, rms_norm_eps=1e-3)
    load_kept_model_config(config)
    assert len(list(cache.iterdir())) == MAX_ENTRIES
