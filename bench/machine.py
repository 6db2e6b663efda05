"""What a result must say about where it was measured."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def describe() -> str:
    """Processor, cores, memory and versions, in one line."""
    model = flags = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
        elif line.startswith("flags"):
            words = line.split()
            flags = "+".join(name for name in ("avx512f", "avx512_bf16", "amx_bf16") if name in words) or "no AVX-512"
    if torch.cuda.is_available():
        model = f"{torch.cuda.get_device_name()}, {model}"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{model} ({flags}), {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def write_result(name: str, text: str) -> Path:
    """Keep a result beside the benchmarks."""
    file = Path(__file__).parent / "results" / name
    file.write_text(text)
    return file
