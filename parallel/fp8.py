"""Numbers of eight bits with a scale a block (e4m3; DeepSeek-AI 2024): matrices with one for 128 x 128 numbers, activations
with one for 128 numbers of a token.

A rank's slice of a matrix may begin or end inside a block. Its scales are then kept for smaller blocks, a `Grid`, whose
edges are also those of the slice; blocks of the checkpoint stand there several times.

Legend: T tokens, R rows and C columns of a matrix, G the columns of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .weights import Piece, ShardedWeight, TensorSource

E4M3 = torch.float8_e4m3fn
SCALE_ENDING = "_scale_inv"
# The largest number that e4m3 has.
MAX_E4M3 = 448.0
BLOCK = 128
# Where all numbers are 0 any scale will do.
MIN_AMAX = 1e-12
# Rows that are dequantised at a time.
TILE_ROWS = 512


@dataclass(frozen=True)
class Grid:
    """Rows and columns of a matrix that share a scale."""

    rows: int = BLOCK
    columns: int = BLOCK

    @staticmethod
    def of(row_cuts: tuple[int, ...], column_cuts: tuple[int, ...]) -> Grid:
        """The largest that has an edge at each of these places."""
        return Grid(math.gcd(BLOCK, *row_cuts), math.gcd(BLOCK, *column_cuts))

    def shape_for(self, rows: int, columns: int) -> tuple[int, int]:
        """Of a matrix' scales."""
        return -(-rows // self.rows), -(-columns // self.columns)

    def spread(self, scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """Scales [..., R / rows, C / columns] of every number, [..., R, C]."""
        wide = scales.repeat_interleave(self.rows, -2)[..., :rows, :]
        return wide.repeat_interleave(self.columns, -1)[..., :columns]


def quantise_blocks(values: torch.Tensor, grid: Grid = Grid()) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., R, C] -> e4m3 of the same shape, and float32 scales [..., R / rows, C / columns] to multiply it by."""
    rows, columns = values.shape[-2:]
    num_rows, num_columns = grid.shape_for(rows, columns)
    wide = values.float()
    padded = F.pad(wide, (0, num_columns * grid.columns - columns, 0, num_rows * grid.rows - rows))
    blocks = padded.unflatten(-1, (num_columns, grid.columns)).unflatten(-3, (num_rows, grid.rows))
    largest = blocks.abs().amax(dim=(-3, -1)).clamp(min=MIN_AMAX)
    # By a tensor: on CUDA torch divides by a number as it multiplies by its reciprocal, whose last bit may be another.
    scales = largest / largest.new_full((), MAX_E4M3)
    return to_e4m3(wide / grid.spread(scales, rows, columns)), scales


def dequantise(
    data: torch.Tensor, scales: torch.Tensor, grid: Grid = Grid(), dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """e4m3 [..., R, C] and its scales -> [..., R, C], rounded once."""
    return (data.float() * grid.spread(scales, *data.shape[-2:])).to(dtype)


def rows_of_heads_torch(
    data: torch.Tensor, scales: torch.Tensor, grid: Grid, width: int, part: slice, dtype: torch.dtype
) -> torch.Tensor:
    """Of e4m3 [H * width, C] the rows `part` of every head, dequantised: [H, n, C]."""
    return dequantise(data, scales, grid, dtype).unflatten(0, (-1, width))[:, part]


def quantise_tokens(x: torch.Tensor, columns: int = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations [T, C] -> e4m3 [T, C] and float32 scales [T, C / columns], one for so many numbers of a token. They are
    multiplied by the reciprocal of the scale, which costs a kernel less than to divide them."""
    width, grid = x.shape[-1], Grid(1, columns)
    wide = x.float()
    groups = F.pad(wide, (0, -width % columns)).unflatten(-1, (-1, columns))
    largest = groups.abs().amax(dim=-1).clamp(min=MIN_AMAX)
    most = largest.new_full((), MAX_E4M3)
    return to_e4m3(wide * grid.spread(most / largest, len(x), width)), largest / most


def to_e4m3(values: torch.Tensor) -> torch.Tensor:
    """Rounded; what rounds to more than the largest number becomes it."""
    return values.clamp(-MAX_E4M3, MAX_E4M3).to(E4M3)


def through_e4m3(x: torch.Tensor, columns: int = BLOCK) -> torch.Tensor:
    """Activations as FP8 products see them, in their own dtype."""
    return dequantise(*quantise_tokens(x, columns), Grid(1, columns), x.dtype)


def linear_fp8_torch(
    x: torch.Tensor,
    data: torch.Tensor,
    scales: torch.Tensor,
    grid: Grid,
    bias: torch.Tensor | None,
    *,
    quantises: bool = False,
) -> torch.Tensor:
    """[T, C] times the transpose of e4m3 [R, C], which is dequantised tile by tile: [T, R]. With `quantises` activations go
    through e4m3, too, in groups as wide as the grid's."""
    x = through_e4m3(x, grid.columns) if quantises else x
    tile_rows = TILE_ROWS // grid.rows * grid.rows
    products = [
        F.linear(x, dequantise(rows, tile_scales, grid, x.dtype))
        for rows, tile_scales in zip(data.split(tile_rows), scales.split(tile_rows // grid.rows), strict=True)
    ]
    product = products[0] if len(products) == 1 else torch.cat(products, dim=-1)
    return product if bias is None else product + bias


@dataclass(frozen=True)
class QuantisedWeight(ShardedWeight):
    """A matrix that a checkpoint may have in e4m3 or in floating point: that is quantised as it is loaded, and `scale`, its
    other tensor, comes of it. Or a stack of them, in floating point alone, each of which is several of `num_rows` rows, one
    behind the other. `scales` are a rank's, by piece."""

    scales: tuple[torch.Tensor, ...]
    scale: ShardedWeight | None
    grid: Grid
    num_rows: int

    def check_dtype(self, dtype: torch.dtype) -> None:
        if dtype != E4M3 or self.scale is None:
            super().check_dtype(dtype)

    def load(self, source: TensorSource) -> None:
        """One matrix at a time: what quantising takes is a multiple of it."""
        self.check(tuple(source.shape))
        for piece, scales in zip(self.pieces, self.scales, strict=True):
            *stack, rows, columns = piece.index
            # Whole blocks: a scale is that of all their numbers.
            around = _whole_blocks(rows, self.num_rows), _whole_blocks(columns, self.shape[-1])
            inside = _within(rows, around[0]), _within(columns, around[1])
            if not stack:
                self._load_matrix(source[around], inside, piece.storage, scales)
            for place, number in enumerate(range(stack[0].start, stack[0].stop) if stack else ()):
                matrix = source[(slice(number, number + 1), *around)][0]
                self._load_matrix(matrix, inside, piece.storage[place], scales[place])

    def _load_matrix(
        self, values: torch.Tensor, inside: tuple[slice, slice], storage: torch.Tensor, scales: torch.Tensor
    ) -> None:
        if values.dtype == E4M3:
            storage.copy_(values[inside])
            return
        data, found = quantise_blocks(values.to(storage.device))
        storage.copy_(data[inside])
        rows, columns = (
            torch.arange(part.start, part.stop, step, device=found.device) // BLOCK
            for part, step in zip(inside, (self.grid.rows, self.grid.columns), strict=True)
        )
        scales.copy_(found[rows[:, None], columns[None, :]])


def _whole_blocks(part: slice, size: int) -> slice:
    """Those that a part of a dim has a share in; blocks are counted anew every `size` places, and the last is cut off."""
    first = part.start // size * size
    begin = (part.start - first) // BLOCK * BLOCK
    return slice(first + begin, first + min(-(-(part.stop - first) // BLOCK) * BLOCK, size))


def _within(part: slice, around: slice) -> slice:
    return slice(part.start - around.start, part.stop - around.start)


def scale_name(name: str) -> str:
    """Of the scales of a tensor, in a checkpoint."""
    return f"{name}{SCALE_ENDING}"


def with_scales(weights: Mapping[str, ShardedWeight]) -> dict[str, ShardedWeight]:
    """The same, and the scales of those that are quantised."""
    scales = {
        scale_name(name): weight.scale
        for name, weight in weights.items()
        if isinstance(weight, QuantisedWeight) and weight.scale is not None
    }
    return {**weights, **scales}


def scale_names(weights: Mapping[str, ShardedWeight]) -> dict[str, str]:
    """By the name of the weight that they belong to; weights in floating point bring them along."""
    return {name: scale_name(name) for name in weights if scale_name(name) in weights}


def sharded_scale(weight: ShardedWeight, scales: tuple[torch.Tensor, ...], grid: Grid) -> ShardedWeight:
    """The tensor of scales that goes with a weight: every row or column of a rank's grid is a piece, unless they are the
    checkpoint's own blocks."""
    shape = (*weight.shape[:-2], *Grid().shape_for(*weight.shape[-2:]))
    pieces: list[Piece] = []
    for piece, storage in zip(weight.pieces, scales, strict=True):
        *stack, rows, columns = piece.index
        for row_blocks, row_place in _blocks_of(rows, grid.rows):
            for column_blocks, column_place in _blocks_of(columns, grid.columns):
                part = storage[..., row_place, column_place]
                pieces.append(Piece((*stack, row_blocks, column_blocks), part))
    return ShardedWeight(shape, tuple(pieces))


def _blocks_of(part: slice, step: int) -> list[tuple[slice, slice]]:
    """Blocks of a checkpoint under a rank's part of a dim, and their places in its scales, one every `step`."""
    if step == BLOCK:
        first, stop = part.start // BLOCK, -(-part.stop // BLOCK)
        return [(slice(first, stop), slice(0, stop - first))]
    return [
        (slice(place // BLOCK, place // BLOCK + 1), slice(number, number + 1))
        for number, place in enumerate(range(part.start, part.stop, step))
    ]
