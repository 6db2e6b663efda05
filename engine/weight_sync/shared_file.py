"""Tensors as a safetensors file in shared memory, for the ranks of this host."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

SHARED_MEMORY = Path("/dev/shm")


@contextmanager
def shared_safetensors(named_tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """The file's path; it is gone after the block. Where the host has no shared memory folder, the temporary one serves."""
    folder = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="waybill-", dir=folder) as place:
        path = f"{place}/update.safetensors"
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in named_tensors.items()}, path)
        yield path
