"""Tensors on their way to the ranks of a host lie in memory without a name."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from waybill.engine.weight_sync.shared_file import shared_safetensors

READER = """
import sys
from safetensors.torch import load_file
print({name: (str(tensor.dtype), tensor.tolist()) for name, tensor in sorted(load_file(sys.argv[1]).items())})
"""


def own_memory_files() -> list[str]:
    """Those that this process holds open; what other tests have left to the garbage collector comes and goes."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return [link for link in found if "memfd:waybill-weights" in link]


def test_another_process_reads_it_and_nothing_is_left() -> None:
    tensors = {
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "brain": torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16),
        "half \u00e4": torch.arange(3, dtype=torch.float16),
        "whole": torch.tensor([-1, 2**40]),
        "truth": torch.tensor([True, False]),
        "turned": torch.arange(6.0).view(2, 3).T,
    }
    names = set(os.listdir("/dev/shm"))
    with shared_safetensors(tensors) as path:
        assert set(os.listdir("/dev/shm")) == names
        assert len(own_memory_files()) == 1
        here = load_file(path)
        there = subprocess.run([sys.executable, "-c", READER, path], capture_output=True, text=True, check=True).stdout
    assert all(torch.equal(here[name], tensor) and here[name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert "'brain': ('torch.bfloat16', [[1.5, -2.0]])" in there
    assert not Path(path).exists() and not own_memory_files()


def test_numbers_that_the_format_has_not_are_refused() -> None:
    refused = pytest.raises(ValueError, match=r"tensor a: dtype torch\.complex64: must be one of torch\.bfloat16")
    with refused, shared_safetensors({"a": torch.zeros(3, dtype=torch.complex64)}):
        pass
