"""Builds and calls the bfloat16 kernel of `experts_bf16.cpp`, where the CPU and a C++ compiler allow.

Building takes about a second and happens once: the library is kept in the user's cache folder, under a name made from
its source and flags. This file knows nothing of experts on other devices or in other dtypes.

Legend: T tokens, D hidden, F experts on this rank, K experts per token, I intermediate width on this rank.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("experts_bf16.cpp")
CPU_FEATURES = ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "avx512_bf16")
FLAGS = (
    *("-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-w"),
    *("-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16"),
)
# The widths that the kernel takes are multiples of the products of one instruction.
WIDTH_MULTIPLE = 32
BUILD_TIMEOUT_S = 120.0


def cache_folder() -> Path:
    """Where built kernels are kept, by the XDG convention."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "waybill"


def build(source: Path, folder: Path, compiler: str) -> Path:
    """Compile `source` into `folder` unless it is there already. Several processes may do so at once.

    Raises:
        OSError: the folder cannot be written.
        subprocess.SubprocessError: the compiler failed or ran past its time.
    """
    text = source.read_bytes()
    library = folder / f"{source.stem}-{hashlib.sha256(text + ' '.join(FLAGS).encode()).hexdigest()[:16]}.so"
    if not library.is_file():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / library.name
            command = [compiler, *FLAGS, str(source), "-o", str(built)]
            subprocess.run(command, check=True, capture_output=True, timeout=BUILD_TIMEOUT_S)
            built.replace(library)
    return library


@cache
def load_kernel() -> ctypes._NamedFuncPointer | None:
    """The kernel; None, said once in the log, where this machine cannot have it."""
    capabilities = torch.cpu.get_capabilities()
    if not all(capabilities.get(feature) for feature in CPU_FEATURES):
        return None
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        logger.warning("no C++ compiler on PATH: experts run on torch alone, about half as fast")
        return None
    try:
        kernel = ctypes.CDLL(str(build(SOURCE, cache_folder(), compiler))).waybill_experts_bf16
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("the experts' kernel could not be built, they run on torch alone, about half as fast: %s", error)
        return None
    kernel.restype = None
    kernel.argtypes = [ctypes.c_void_p] * 8 + [ctypes.c_int64] * 5 + [ctypes.c_int]
    return kernel


def has_native_experts(dtype: torch.dtype, hidden_size: int, intermediate_size: int) -> bool:
    """Whether `experts_native` can run: bfloat16, widths that are multiples of 32, and a machine for the kernel."""
    if dtype != torch.bfloat16 or hidden_size % WIDTH_MULTIPLE or intermediate_size % WIDTH_MULTIPLE:
        return False
    return load_kernel() is not None


def experts_native(
    hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """One pass over the weights, no copy of tokens. A token's result does not depend on what it is computed with."""
    kernel = load_kernel()
    assert kernel is not None
    (num_tokens, width), top_k, (num_local, _, intermediate) = hidden.shape, ids.shape[1], down.shape
    activated = hidden.new_empty(num_tokens * top_k, intermediate)
    sums = torch.zeros(num_tokens, width)
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    # Bound to names: the tensors must live until the kernel returns.
    tensors = [x.contiguous() for x in (hidden, ids, weights.float(), gate_up, down)] + [activated, sums, out]
    sizes = (num_tokens, width, num_local, top_k, intermediate)
    kernel(*(x.data_ptr() for x in tensors), *sizes, torch.get_num_threads())
    return out
