"""Tensors as a safetensors file in memory, for the ranks of this host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec
import torch

from .memory_file import memory_file, write_all

# The format's names; it has more, which no weight of a model here has.
DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
HEADER_ALIGNMENT = 8


@contextmanager
def shared_safetensors(named_tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """The file's path; it is gone after the block. The format's own writer needs a folder, which would outlive a killed
    process.

    Raises:
        ValueError: a tensor is none of floating-point numbers.
    """
    with memory_file() as (descriptor, path):
        header = encode_header(named_tensors)
        write_all(descriptor, len(header).to_bytes(8, "little") + header)
        for tensor in named_tensors.values():
            values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            write_all(descriptor, values.numpy().data)
        yield path


def encode_header(named_tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Name, dtype, shape and place of every tensor, one behind the other; padded."""
    entries: dict[str, Any] = {}
    end = 0
    for name, tensor in named_tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"tensor {name}: dtype {tensor.dtype}: must be one of {', '.join(map(str, DTYPE_NAMES))}")
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = msgspec.json.encode(entries)
    return header + b" " * (-len(header) % HEADER_ALIGNMENT)
