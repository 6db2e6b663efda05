"""Matrices in MXFP4 (Open Compute Project 2023), as gpt-oss's experts are on the hub: read by rank, and dequantised as they
are loaded.

Two tensors hold a stack of matrices [E, R, C]: `blocks` [E, R, C / 32, 16] uint8, two numbers of four bits in each, the
lower first; and `scales` [E, R, C / 32] uint8, the exponent of every 32 numbers. The model knows the stack transposed,
[E, C, R], and without the endings of their names.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from ...parallel.weights import Piece
from .safetensors_file import SafetensorsFile, StoredTensor

# The dtype that such a stack is said to have.
MXFP4 = "MXFP4"
BLOCKS, SCALES = "_blocks", "_scales"
GROUP = 32
EXPONENT_BIAS = 127
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class StoredBytes:
    """A tensor of bytes, and the file that it is in."""

    file: SafetensorsFile
    tensor: StoredTensor

    def read(self, expert: int, rows: slice) -> torch.Tensor:
        """Some rows of a matrix.

        Raises:
            OSError, ValueError: the file cannot be read, or holds other tensors by now.
        """
        _, num_rows, *rest = self.tensor.shape
        row_bytes = self.tensor.num_bytes // (self.tensor.shape[0] * num_rows)
        with self.file.open() as file:
            begin = self.tensor.begin + (expert * num_rows + rows.start) * row_bytes
            num_bytes = (rows.stop - rows.start) * row_bytes
            data = bytearray(os.pread(file.fileno(), num_bytes, begin))
        if len(data) < num_bytes:
            raise ValueError(f"{self.file.path.name}: it ends before its last tensor does")
        return torch.frombuffer(data, dtype=torch.uint8).view(rows.stop - rows.start, *rest)


@dataclass(frozen=True)
class PackedTensor:
    """A stack of matrices as two tensors of a checkpoint."""

    blocks: StoredBytes
    scales: StoredBytes

    @property
    def shape(self) -> tuple[int, int, int]:
        """As the model knows it: [E, C, R]."""
        num_experts, num_rows, num_groups = self.scales.tensor.shape
        return num_experts, num_groups * GROUP, num_rows

    def load(self, piece: Piece) -> None:
        """Fill a rank's part of the stack [E, C, R], one matrix after the other; of C it reads whole rows."""
        experts, columns, rows = piece.index
        for place, expert in enumerate(range(experts.start, experts.stop)):
            blocks, scales = (part.read(expert, rows) for part in (self.blocks, self.scales))
            groups = slice(columns.start // GROUP, -(-columns.stop // GROUP))
            device = piece.storage.device
            values = dequantise(blocks[:, groups].to(device), scales[:, groups].to(device))
            first = columns.start - groups.start * GROUP
            piece.storage[place].copy_(values[:, first : first + columns.stop - columns.start].t())


def dequantise(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[..., G, 16] and [..., G] uint8 -> [..., 32 G] float32, which holds every number exactly."""
    table = torch.tensor([*VALUES, *(-value for value in VALUES)], device=blocks.device)
    pairs = torch.stack((blocks & 0xF, blocks >> 4), dim=-1).flatten(-2)
    exponents = scales.to(torch.int32)[..., None] - EXPONENT_BIAS
    return torch.ldexp(table[pairs.int()], exponents).flatten(-2)


def find_packed(files: Mapping[str, SafetensorsFile]) -> Iterator[tuple[str, PackedTensor]]:
    """Those of a checkpoint by the model's name; `files` has the file of each of its tensors.

    Raises:
        ValueError: one has no scales, or two that do not fit.
    """
    for name, file in files.items():
        if not name.endswith(BLOCKS) or file.tensors[name].dtype != "U8":
            continue
        plain = name.removesuffix(BLOCKS)
        if f"{plain}{SCALES}" not in files:
            raise ValueError(f"the checkpoint lacks {plain}{SCALES}, which {name} needs")
        scales_file = files[f"{plain}{SCALES}"]
        blocks, scales = file.tensors[name], scales_file.tensors[f"{plain}{SCALES}"]
        if scales.dtype != "U8" or blocks.shape != (*scales.shape, GROUP // 2) or len(scales.shape) != 3:
            raise ValueError(f"tensor {name}: shape {blocks.shape} with scales of {scales.shape} is no MXFP4")
        yield plain, PackedTensor(StoredBytes(file, blocks), StoredBytes(scales_file, scales))
