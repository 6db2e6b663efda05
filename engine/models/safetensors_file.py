"""What a safetensors file holds and where, so that any part of it can be read by its place.

The library checks the file. It gives tensors out of a mapped file only, page fault by page fault, and a look-up of each
costs as much as all of the header.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec
import torch
from safetensors import safe_open

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
}
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
METADATA = "__metadata__"


class HeaderEntry(msgspec.Struct):
    """A tensor, as the format describes it."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """`dtype` is as safetensors names it, "BF16" for instance; `begin` counts from the file's begin."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    num_bytes: int


class SafetensorsFile:
    """A file's tensors by name.

    Raises:
        SafetensorError, OSError, ValueError: it is no safetensors file, or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            self._header = read_header(file)
        self.metadata: dict[str, str] = {}
        self.tensors = self._parse()

    def _parse(self) -> dict[str, StoredTensor]:
        data_begin = LENGTH_BYTES + len(self._header)
        decoder = msgspec.json.Decoder(HeaderEntry)
        tensors: dict[str, StoredTensor] = {}
        try:
            for name, raw in msgspec.json.decode(self._header, type=dict[str, msgspec.Raw]).items():
                if name == METADATA:
                    self.metadata = msgspec.json.decode(raw, type=dict[str, str])
                else:
                    entry = decoder.decode(raw)
                    begin, end = entry.data_offsets
                    tensors[name] = StoredTensor(entry.dtype, entry.shape, data_begin + begin, end - begin)
        except msgspec.DecodeError as error:
            raise ValueError(f"{self.path.name}: {error}") from None
        return tensors

    def open(self) -> BinaryIO:
        """The file again, for its tensors' bytes.

        Raises:
            OSError: it cannot be opened.
            ValueError: it holds other tensors by now.
        """
        file = self.path.open("rb")
        if read_header(file) != self._header:
            file.close()
            raise ValueError(f"{self.path.name}: it was written again since it was checked")
        return file


def read_header(file: BinaryIO) -> bytes:
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    # Whatever the library has let pass is shorter; a file that was written since may say anything.
    return file.read(min(length, MAX_HEADER_BYTES))


def dtype_of(tensor: StoredTensor) -> torch.dtype:
    """
    Raises:
        ValueError: the tensor holds no floating-point numbers.
    """
    if tensor.dtype not in DTYPES:
        raise ValueError(f"dtype {tensor.dtype}: must be one of {', '.join(DTYPES)}")
    dtype = DTYPES[tensor.dtype]
    if tensor.num_bytes != math.prod(tensor.shape) * dtype.itemsize:
        raise ValueError(f"{tensor.num_bytes} bytes are no {tensor.dtype} of shape {tensor.shape}")
    return dtype
