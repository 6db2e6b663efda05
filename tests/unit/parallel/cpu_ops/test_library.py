"""How the C++ operators come about, and that torch serves without them."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from waybill.parallel.cpu_ops import library
from waybill.parallel.cpu_ops.experts import has_native_experts
from waybill.parallel.cpu_ops.linear import linear_native
from waybill.parallel.weight_format import WeightFormat

FORMAT = WeightFormat(torch.bfloat16, torch.device("cpu"))
needs_operators = pytest.mark.skipif(not library.supported_sets(), reason="needs AVX2 and a C++ compiler")


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty one, and nothing remembered before and after."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    remembered = (library.load_set, library.operators_of)
    for function in remembered:
        function.cache_clear()
    yield tmp_path / "waybill"
    for function in remembered:
        function.cache_clear()


@needs_operators
def test_without_a_compiler_torch_serves_and_the_log_says_so(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert FORMAT.linear() is F.linear
        assert not has_native_experts(torch.bfloat16, 32, 32)
    assert caplog.text.count("no C++ compiler") == 1


@needs_operators
def test_a_build_that_fails_falls_back(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "broken.cpp").write_text("not C++")
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    assert library.load_operators() == {}
    assert "could not be built" in caplog.text
    assert list(cache_folder.iterdir()) == []


def test_a_compiler_that_does_not_know_the_best_set_builds_the_next(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, operators = [], {"an operator": None}

    def load_set(name: str) -> dict[str, None]:
        asked.append(name)
        return {} if name == "amx_bf16" else operators

    monkeypatch.setattr(library, "supported_sets", lambda: ("amx_bf16", "avx512_bf16", "avx2"))
    monkeypatch.setattr(library, "load_set", load_set)
    monkeypatch.setattr(library, "compiler", lambda: "c++")
    assert library.operators_of("auto") == operators and asked == ["amx_bf16", "avx512_bf16"]
    # One that is asked for by name is that one, or none.
    assert library.operators_of("amx_bf16") == {}


@needs_operators
def test_another_processor_has_none(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.SWITCH, "auto")
    monkeypatch.setattr(library, "has_feature", lambda name: name == "avx2")
    assert library.load_operators() == {}
    assert not cache_folder.exists()


def test_the_best_that_the_processor_has_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    features = {"avx512_bf16", "avx2", "fma3"}
    monkeypatch.setattr(library, "has_feature", features.__contains__)
    assert library.chosen_set("auto") == "avx2"
    features |= {"avx512_f", "avx512_bw", "avx512_dq", "avx512_vl"}
    assert library.chosen_set("auto") == "avx512_bf16"
    assert library.chosen_set("avx512") == "avx512"
    features.remove("avx512_vl")
    with pytest.raises(
        ValueError, match="WAYBILL_CPU_OPERATORS='avx512': must be one of auto, off, avx2 on this processor"
    ):
        library.chosen_set("avx512")


@needs_operators
def test_the_library_is_built_once_per_source(cache_folder: Path, instruction_set: str) -> None:
    if instruction_set != library.supported_sets()[0]:
        pytest.skip("a build takes long")
    # Nothing is called: the fewer optimisations, the sooner.
    compiler, flags = shutil.which("c++") or "g++", (*library.INSTRUCTION_SETS[instruction_set].flags, "-O1")
    first = library.build(library.FOLDER, cache_folder, compiler, flags)
    built_at = os.stat(first).st_mtime_ns
    assert library.build(library.FOLDER, cache_folder, compiler, flags) == first
    assert os.stat(first).st_mtime_ns == built_at
    symbols = subprocess.run(["nm", "-D", str(first)], capture_output=True, text=True, check=True).stdout
    assert {word for word in symbols.split() if word.startswith("waybill_")} == library.OPERATORS.keys()


@needs_operators
def test_the_environment_switches_them_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.SWITCH, "auto")
    assert FORMAT.linear() is linear_native
    monkeypatch.setenv(library.SWITCH, "off")
    assert FORMAT.linear() is F.linear
    assert not has_native_experts(torch.bfloat16, 32, 32)


def test_a_switch_that_is_neither_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.SWITCH, "0")
    with pytest.raises(ValueError, match="WAYBILL_CPU_OPERATORS='0': must be one of auto, off"):
        FORMAT.linear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_stay_with_torch(dtype: torch.dtype) -> None:
    assert WeightFormat(dtype, torch.device("cpu")).linear() is F.linear
