"""Builds the operators of this folder as one library, and finds them in it.

The instruction set is chosen when they are first used: the best that the processor has, or the one that the environment
variable `WAYBILL_CPU_OPERATORS` names. Building takes some seconds and happens once: the library is kept in the user's
cache folder, under a name made from its sources and flags. Where a machine cannot have it - another processor, no
compiler - there is no operator, and torch serves; so it does with `WAYBILL_CPU_OPERATORS=off`.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
SWITCH = "WAYBILL_CPU_OPERATORS"
# More for the compiler, as the run under AddressSanitizer has.
EXTRA_FLAGS = "WAYBILL_CPU_OPERATORS_FLAGS"


@dataclass(frozen=True)
class InstructionSet:
    """What torch.cpu.get_capabilities() must say, and how the compiler is told."""

    features: tuple[str, ...]
    flags: tuple[str, ...]


AVX2 = InstructionSet(("avx2", "fma3"), ("-mavx2", "-mfma"))
AVX512 = InstructionSet(
    (*AVX2.features, "avx512_f", "avx512_bw", "avx512_dq", "avx512_vl"),
    (*AVX2.flags, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
)
# The fastest first.
INSTRUCTION_SETS = {
    "avx512_bf16": InstructionSet((*AVX512.features, "avx512_bf16"), (*AVX512.flags, "-mavx512bf16")),
    "avx512": AVX512,
    "avx2": AVX2,
}
# Products are fused with sums where the sources say so, not where the compiler likes, which depends on the code around.
FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-ffp-contract=off", "-shared", "-fPIC", "-w")
# By name: the types of their arguments. None of them returns anything.
OPERATORS: dict[str, list[type]] = {
    "waybill_experts_bf16": [ctypes.c_void_p] * 7 + [ctypes.c_int64] * 6 + [ctypes.c_int],
    "waybill_attention_bf16": [ctypes.c_void_p] * 9 + [ctypes.c_int64] * 7 + [ctypes.c_float, ctypes.c_int],
    "waybill_rms_norm_bf16": [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 5 + [ctypes.c_float, ctypes.c_int],
    "waybill_norm_rope_store_bf16": [ctypes.c_void_p] * 9 + [ctypes.c_int64] * 6 + [ctypes.c_float, ctypes.c_int],
    "waybill_linear_bf16": [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 6 + [ctypes.c_int],
}
# In which one rank sums what ranks would share: results of one and of two ranks have the same bits.
NUM_PARTS = 2
BUILD_TIMEOUT_S = 120.0


def cache_folder() -> Path:
    """Where built libraries are kept, by the XDG convention."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "waybill"


def build(
    sources: Path, folder: Path, compiler: str, instructions: InstructionSet, extra_flags: tuple[str, ...] = ()
) -> Path:
    """Compile what is in `sources` into `folder` unless it is there already. Several processes may do so at once.

    Raises:
        OSError: the folder cannot be written.
        subprocess.SubprocessError: the compiler failed or ran past its time.
    """
    flags = (*FLAGS, *instructions.flags, *extra_flags)
    digest = hashlib.sha256(" ".join(flags).encode())
    for file in sorted([*sources.glob("*.cpp"), *sources.glob("*.h")]):
        digest.update(file.read_bytes())
    library = folder / f"cpu_ops-{digest.hexdigest()[:16]}.so"
    if not library.is_file():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / library.name
            command = [compiler, *flags, *map(str, sorted(sources.glob("*.cpp"))), "-o", str(built)]
            subprocess.run(command, check=True, capture_output=True, timeout=BUILD_TIMEOUT_S)
            built.replace(library)
    return library


def instruction_sets() -> list[str]:
    """Those of `INSTRUCTION_SETS` that the processor has."""
    return [name for name, each in INSTRUCTION_SETS.items() if all(map(has_feature, each.features))]


def chosen_instruction_set() -> str | None:
    """The one to use; None: torch serves.

    Raises:
        ValueError: the environment names one that does not exist, or that the processor does not have.
    """
    switch, available = os.environ.get(SWITCH, "auto"), instruction_sets()
    if switch == "auto":
        return available[0] if available else None
    if switch == "off":
        return None
    if switch not in available:
        raise ValueError(f"{SWITCH}={switch!r}: must be {', '.join(map(repr, ('auto', 'off', *available)))}")
    return switch


@cache
def load_operators() -> dict[str, ctypes._NamedFuncPointer]:
    """Those of `OPERATORS`, for the instruction set that was chosen when they were first asked for; none, said once in the
    log, where this machine cannot have them."""
    chosen = chosen_instruction_set()
    if chosen is None:
        return {}
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        logger.warning("no C++ compiler on PATH: bfloat16 runs on torch alone, at half the speed or less")
        return {}
    extra_flags = tuple(os.environ.get(EXTRA_FLAGS, "").split())
    try:
        path = build(FOLDER, cache_folder(), compiler, INSTRUCTION_SETS[chosen], extra_flags)
        library = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning(
            "the CPU operators could not be built, bfloat16 runs on torch alone, at half the speed or less: %s", error
        )
        return {}
    operators = {name: library[name] for name in OPERATORS}
    for name, operator in operators.items():
        operator.restype, operator.argtypes = None, OPERATORS[name]
    return operators


@cache
def has_feature(name: str) -> bool:
    """Whether the processor has what torch calls so."""
    return bool(torch.cpu.get_capabilities().get(name))


def has_operator(name: str) -> bool:
    """Whether one of `OPERATORS` is to be used; if not, torch serves.

    Raises:
        ValueError: as `chosen_instruction_set`.
    """
    return chosen_instruction_set() is not None and name in load_operators()
