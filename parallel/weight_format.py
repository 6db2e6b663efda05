"""How the matrices of linear and expert layers are stored, and what multiplies by them.

Layers are given a format instead of a dtype: they make their weights here and take the product that goes with them.

Legend: T tokens, R rows (outputs) and C columns (inputs) of a matrix on this rank, F matrices of a stack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .cpu_ops.linear import has_native_linear, linear_native, row_parallel_native
from .fp8 import BLOCK, E4M3, Grid, QuantisedWeight, linear_fp8_torch, rows_of_heads_torch, sharded_scale
from .huge_pages import prefer_huge_pages
from .weights import Piece, ShardedWeight

# (x [T, C], weight [R, C], bias [R] or None) -> [T, R]
Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]

# The depth of the smallest product of e4m3 numbers that GPUs have.
MIN_COLUMNS = 32
# See `linear_fp8_torch` and `rows_of_heads_torch`.
Fp8Function = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Placed:
    """A part of a rank's matrices: `rows` of each of those that `stack` chooses, () where there is one alone, and all
    columns; `index` says where it stands in an unsharded tensor."""

    index: tuple[slice, ...]
    rows: slice
    stack: tuple[int | slice, ...] = ()


def select_fp8_functions(device: torch.device) -> tuple[Fp8Function, Fp8Function]:
    """The fastest for the device."""
    if device.type == "cpu":
        return linear_fp8_torch, rows_of_heads_torch
    # Triton comes with torch's CUDA builds alone.
    from .fp8_split_triton import linear_fp8_by_rows  # noqa: PLC0415
    from .fp8_triton import rows_of_heads_triton  # noqa: PLC0415

    return linear_fp8_by_rows, rows_of_heads_triton


class Matrix(nn.Module):
    """[R, C] on this rank, or a stack [F, R, C], in floating point."""

    def __init__(self, data: nn.Parameter, weight_format: WeightFormat) -> None:
        super().__init__()
        self.data = data
        self._weight_format = weight_format
        self._linear = weight_format.linear()

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[T, C] -> [T, R]."""
        return self._linear(x, self.data, bias)

    def shard_over(self, num_ranks: int) -> None:
        """The columns are a rank's of so many: `forward` gives this rank's term of their sum, maybe in float32."""
        self._linear = self._weight_format.row_parallel(num_ranks)

    def product_of_rows(self, x: torch.Tensor, rows: slice) -> torch.Tensor:
        """[T, C] -> the columns [T, R'] of the product that these rows make."""
        return self._linear(x, self.data[rows], None)

    def rows_of_heads(self, width: int, part: slice) -> torch.Tensor:
        """Where every head has `width` rows, a part of each head's: [H, n, C] in the model's dtype."""
        return self.data.unflatten(0, (-1, width))[:, part]

    @property
    def stored(self) -> Stack:
        """What functions of stacks take."""
        return self.data

    def sharded(self, shape: tuple[int, ...], *parts: Placed, num_fused: int = 1) -> ShardedWeight:
        """Where an unsharded tensor of a checkpoint goes; it may be so many matrices, one behind the other."""
        pieces = [Piece(part.index, self.data.data[(*part.stack, part.rows)]) for part in parts]
        return ShardedWeight(shape, tuple(piece for piece in pieces if piece.storage.numel()))


class Fp8Matrix(Matrix):
    """In e4m3, with float32 `scales` [..., R / rows, C / columns] of a grid. Where `quantises` activations are e4m3, too,
    with a scale for every group of a token's numbers."""

    def __init__(self, shape: tuple[int, ...], grid: Grid, weight_format: Fp8Format) -> None:
        device = weight_format.device
        data = torch.zeros(shape, dtype=E4M3, device=device)
        super().__init__(nn.Parameter(data, requires_grad=False), weight_format)
        scales = torch.zeros(*shape[:-2], *grid.shape_for(*shape[-2:]), device=device)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.grid = grid
        self.dtype = weight_format.dtype
        self.quantises = weight_format.quantises_activations
        self._product, self._rows_of_heads = select_fp8_functions(device)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self._product(x, self.data, self.scales, self.grid, bias, quantises=self.quantises)

    def product_of_rows(self, x: torch.Tensor, rows: slice) -> torch.Tensor:
        """Of activations as they are: these are latents that others are made of, and hardly any work."""
        first = rows.start // self.grid.rows
        scales = self.scales[first : -(-rows.stop // self.grid.rows)]
        around = slice(first * self.grid.rows, rows.stop)
        product = self._product(x, self.data[around], scales, self.grid, None)
        return product[:, rows.start - around.start :]

    def rows_of_heads(self, width: int, part: slice) -> torch.Tensor:
        return self._rows_of_heads(self.data, self.scales, self.grid, width, part, self.dtype)

    @property
    def stored(self) -> Stack:
        return self

    def product(self, x: torch.Tensor, number: int) -> torch.Tensor:
        """With one matrix of a stack."""
        data, scales = self.data[number], self.scales[number]
        return self._product(x, data, scales, self.grid, None, quantises=self.quantises)

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    def sharded(self, shape: tuple[int, ...], *parts: Placed, num_fused: int = 1) -> ShardedWeight:
        weight = super().sharded(shape, *parts)
        scales = tuple(self._scales_of(part) for part in parts) if weight.pieces else ()
        # A checkpoint has scales of matrices, not of several in one tensor.
        scale = None if len(shape) > 2 else sharded_scale(weight, scales, self.grid)
        return QuantisedWeight(shape, weight.pieces, scales, scale, self.grid, shape[-2] // num_fused)

    def _scales_of(self, part: Placed) -> torch.Tensor:
        rows = slice(part.rows.start // self.grid.rows, -(-part.rows.stop // self.grid.rows))
        return self.scales.data[(*part.stack, rows)]


Stack = torch.Tensor | Fp8Matrix


def product_of_stack(x: torch.Tensor, stack: Stack, number: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """[T, C] times the transpose of one matrix of a stack [F, R, C]: [T, R], in `out` if that is given."""
    if isinstance(stack, Fp8Matrix):
        product = stack.product(x, number)
        return product if out is None else out.copy_(product)
    return F.linear(x, stack[number]) if out is None else torch.mm(x, stack[number].t(), out=out)


@dataclass(frozen=True)
class WeightFormat:
    """Floating-point numbers as they are, in one dtype, which is also that of activations and results."""

    dtype: torch.dtype
    device: torch.device

    def empty(self, *shape: int) -> nn.Parameter:
        """An uninitialised weight that is not trained."""
        data = torch.empty(shape, dtype=self.dtype, device=self.device)
        prefer_huge_pages(data)
        return nn.Parameter(data, requires_grad=False)

    def matrix(self, *shape: int, row_cuts: tuple[int, ...] = (), column_cuts: tuple[int, ...] = ()) -> Matrix:
        """An uninitialised matrix, or a stack of them. It is put together of parts of a checkpoint's; the cuts are all rows
        and columns, by the numbers of the rank's own and the checkpoint's, at which one begins or ends before its edge."""
        return Matrix(self.empty(*shape), self)

    def linear(self) -> Linear:
        """The fastest product for the device, of weights in floating point."""
        if self.device.type == "cpu":
            return linear_native if has_native_linear(self.dtype) else F.linear
        # Triton comes with torch's CUDA builds alone.
        from .linear_triton import linear_triton  # noqa: PLC0415

        return linear_triton

    def row_parallel(self, num_ranks: int) -> Linear:
        """The same of a matrix whose columns are sharded over ranks. The terms of their sum may be in float32."""
        linear = self.linear()
        return partial(row_parallel_native, num_ranks=num_ranks) if linear is linear_native else linear


@dataclass(frozen=True)
class Fp8Format(WeightFormat):
    """The matrices of linear and expert layers in e4m3, see `fp8`; all else as in `WeightFormat`."""

    quantises_activations: bool = False

    def matrix(self, *shape: int, row_cuts: tuple[int, ...] = (), column_cuts: tuple[int, ...] = ()) -> Matrix:
        """
        Raises:
            ValueError: slices of this rank leave so few columns a scale that the device has no product for them.
        """
        grid = Grid.of(row_cuts, column_cuts)
        if self.device.type != "cpu" and grid.columns < MIN_COLUMNS:
            raise ValueError(
                f"tp_size: a rank's columns of FP8 matrices end {grid.columns} into a block of {BLOCK}; must be a multiple "
                f"of {MIN_COLUMNS} on CUDA (fewer ranks)"
            )
        return Fp8Matrix(shape, grid, self)
