"""Tensors as a safetensors file in shared memory, for the ranks of this host."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from safetensors.torch import save_file

from .shared_folder import shared_folder


@contextmanager
def shared_safetensors(named_tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """The file's path; it is gone after the block."""
    with tempfile.TemporaryDirectory(prefix="waybill-", dir=shared_folder()) as place:
        path = f"{place}/update.safetensors"
        save_file(dict(separate(named_tensors)), path)
        yield path


def separate(named_tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors on the CPU; those that share memory, as tied ones do, are copied, which the format asks for."""
    seen: set[int] = set()
    for name, tensor in named_tensors.items():
        whole = tensor.detach().cpu().contiguous()
        storage = whole.untyped_storage().data_ptr()
        yield name, whole.clone() if storage in seen else whole
        seen.add(storage)
