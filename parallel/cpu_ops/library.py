"""Builds the operators of this folder as one library, and finds them in it.

Building takes some seconds and happens once for an instruction set: the library is kept in the user's cache folder, under
a name made from its sources and flags. Where a machine cannot have it - another processor, no compiler - there is no
operator, and torch serves. The environment variable `WAYBILL_CPU_OPERATORS` is `auto`, for the best that the processor
has, the name of an instruction set, or `off`.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from math import gcd
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
SWITCH = "WAYBILL_CPU_OPERATORS"
# More for the compiler, as the run under AddressSanitizer has.
EXTRA_FLAGS = "WAYBILL_CPU_OPERATORS_FLAGS"
FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-w", "-ffp-contract=off", "-mfma", "-mavx2")


@dataclass(frozen=True)
class InstructionSet:
    """What torch.cpu.get_capabilities() must say, and how the compiler is told."""

    features: tuple[str, ...]
    flags: tuple[str, ...]


AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
AVX512_FEATURES = ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl")
AVX512_BF16, AVX512_BF16_FEATURES = (*AVX512, "-mavx512bf16"), (*AVX512_FEATURES, "avx512_bf16")
# The best first.
INSTRUCTION_SETS = {
    "amx_bf16": InstructionSet(
        (*AVX512_BF16_FEATURES, "amx_tile", "amx_bf16"), (*AVX512_BF16, "-mamx-tile", "-mamx-bf16")
    ),
    "avx512_bf16": InstructionSet(AVX512_BF16_FEATURES, AVX512_BF16),
    "avx512": InstructionSet(AVX512_FEATURES, AVX512),
    "avx2": InstructionSet(("avx2", "fma3"), ()),
}
# By name: the types of their arguments. None of them returns anything.
OPERATORS: dict[str, list[type]] = {
    "waybill_experts_bf16": [
        *[ctypes.c_void_p] * 12,
        *[ctypes.c_int64] * 6,
        *(ctypes.c_int, ctypes.c_float, ctypes.c_float, ctypes.c_int),
    ],
    "waybill_attention_bf16": [ctypes.c_void_p] * 9 + [ctypes.c_int64] * 9 + [ctypes.c_float, ctypes.c_int],
    "waybill_absorb_bf16": [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 8 + [ctypes.c_int],
    "waybill_extract_bf16": [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 8 + [ctypes.c_int],
    "waybill_norm_rope_store_bf16": [ctypes.c_void_p] * 9 + [ctypes.c_int64] * 6 + [ctypes.c_float, ctypes.c_int],
    "waybill_rms_norm_bf16": [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 5 + [ctypes.c_float, ctypes.c_int],
    "waybill_sums_of_squares_bf16": [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 4,
    "waybill_swiglu_bf16": [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 3 + [ctypes.c_int],
    "waybill_log_sum_exp": [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 5 + [ctypes.c_int],
    "waybill_sigmoid": [ctypes.c_void_p] * 2 + [ctypes.c_int64],
    "waybill_linear_bf16": [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 6 + [ctypes.c_int],
}
# In which what ranks may share is summed, as a tree: so many ranks, half or a quarter of them, and one give the same bits.
NUM_PARTS = 4
BUILD_TIMEOUT_S = 120.0


def parts_of(size: int, num_ranks: int) -> int:
    """In how many parts one of so many ranks sums its share, `size` terms: those of all ranks are `NUM_PARTS`, or the
    largest power of two that divides their terms. Where ranks cannot share these each has one part."""
    parts, left = divmod(gcd(size * num_ranks, NUM_PARTS), num_ranks)
    return 1 if left else parts


def cache_folder() -> Path:
    """Where built libraries are kept, by the XDG convention."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "waybill"


def build(sources: Path, folder: Path, command: str, more_flags: tuple[str, ...]) -> Path:
    """Compile what is in `sources` into `folder`, by the compiler `command`, unless it is there already. Several processes
    may do so at once.

    Raises:
        OSError: the folder cannot be written.
        subprocess.SubprocessError: the compiler failed or ran past its time.
    """
    flags = (*FLAGS, *more_flags)
    digest = hashlib.sha256(" ".join(flags).encode())
    for file in sorted([*sources.glob("*.cpp"), *sources.glob("*.h")]):
        digest.update(file.read_bytes())
    library = folder / f"cpu_ops-{digest.hexdigest()[:16]}.so"
    if not library.is_file():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / library.name
            arguments = [*flags, *map(str, sorted(sources.glob("*.cpp"))), "-o", str(built)]
            subprocess.run([command, *arguments], check=True, capture_output=True, timeout=BUILD_TIMEOUT_S)
            built.replace(library)
    return library


def supported_sets() -> tuple[str, ...]:
    """Names of `INSTRUCTION_SETS` that this processor has, the best first."""
    names = (name for name, one in INSTRUCTION_SETS.items() if all(map(has_feature, one.features)))
    return tuple(name for name in names if not name.startswith("amx") or may_use_tiles())


@cache
def may_use_tiles() -> bool:
    """Ask the kernel (Linux, x86-64) for the registers of AMX, for this process and its children."""
    arch_prctl, request_component, tile_data = 158, 0x1023, 18
    return sys.platform == "linux" and ctypes.CDLL(None).syscall(arch_prctl, request_component, tile_data) == 0


def chosen_set(switch: str) -> str | None:
    """The name of the instruction set to use by the environment's switch; None: torch serves.

    Raises:
        ValueError: the environment's switch has another value, or asks for what this processor has not.
    """
    if switch == "off":
        return None
    supported = supported_sets()
    if switch == "auto":
        return supported[0] if supported else None
    if switch not in supported:
        raise ValueError(
            f"{SWITCH}={switch!r}: must be one of {', '.join(('auto', 'off', *supported))} on this processor"
        )
    return switch


def load_operators() -> dict[str, ctypes._NamedFuncPointer]:
    """Those of `OPERATORS`; none where this machine cannot have them, or the environment says so.

    Raises:
        ValueError: as `chosen_set`.
    """
    return operators_of(os.environ.get(SWITCH, "auto"))


@cache
def operators_of(switch: str) -> dict[str, ctypes._NamedFuncPointer]:
    """The same, by the value of the environment's switch; every call of an operator asks. A compiler may be too old for the
    best that the processor has: then the next one serves."""
    name = chosen_set(switch)
    if name is None:
        return {}
    if compiler() is None:
        logger.warning("no C++ compiler on PATH: bfloat16 runs on torch alone, about half as fast")
        return {}
    for each in supported_sets() if switch == "auto" else (name,):
        if operators := load_set(each):
            return operators
    logger.warning("no CPU operators could be built: bfloat16 runs on torch alone, about half as fast")
    return {}


def compiler() -> str | None:
    return shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@cache
def load_set(name: str) -> dict[str, ctypes._NamedFuncPointer]:
    """The operators for an instruction set; none, said once in the log, where they cannot be built."""
    more_flags = (*INSTRUCTION_SETS[name].flags, *os.environ.get(EXTRA_FLAGS, "").split())
    try:
        library = ctypes.CDLL(str(build(FOLDER, cache_folder(), compiler() or "c++", more_flags)))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("the CPU operators for %s could not be built: %s", name, error)
        return {}
    operators = {each: library[each] for each in OPERATORS}
    for operator_name, operator in operators.items():
        operator.restype, operator.argtypes = None, OPERATORS[operator_name]
    return operators


@cache
def has_feature(name: str) -> bool:
    """Whether the processor has what torch calls so."""
    return bool(torch.cpu.get_capabilities().get(name))


def has_operator(name: str) -> bool:
    """Whether one of `OPERATORS` is to be used; if not, torch serves.

    Raises:
        ValueError: as `chosen_set`.
    """
    return name in load_operators()
