"""Tensors as a safetensors file in memory, for the ranks of this host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec
import torch

from .memory_file import memory_file, write_all

# The format's names; which of them a weight may have, the ranks say.
DTYPE_NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
}
HEADER_ALIGNMENT = 8


@contextmanager
def shared_safetensors(
    named_tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> Iterator[str]:
    """The file's path; it is gone after the block. The format's own writer needs a folder, which would outlive a killed
    process.

    Raises:
        ValueError: the format has no name for a dtype.
    """
    with memory_file() as (descriptor, path):
        header = encode_header(named_tensors, metadata)
        write_all(descriptor, len(header).to_bytes(8, "little") + header)
        for tensor in named_tensors.values():
            values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            write_all(descriptor, values.numpy().data)
        yield path


def encode_header(named_tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Name, dtype, shape and place of every tensor, one behind the other; padded."""
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, tensor in named_tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"tensor {name}: dtype {tensor.dtype}: must be one of {', '.join(map(str, DTYPE_NAMES))}")
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = msgspec.json.encode(entries)
    return header + b" " * (-len(header) % HEADER_ALIGNMENT)
