"""Linear layers in bfloat16, `linear_bf16.cpp`.

Legend: T tokens, R rows (outputs) and C columns (inputs) of a matrix.
"""

from __future__ import annotations

import torch

from .library import has_operator, load_operators, parts_of

NAME = "waybill_linear_bf16"


def has_native_linear(dtype: torch.dtype) -> bool:
    """Whether `linear_native` can run: bfloat16, and a machine for the operator."""
    return dtype == torch.bfloat16 and has_operator(NAME)


def linear_native(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Twin of `torch.nn.functional.linear` for x [T, C] in bfloat16; sums and bias are in float32, rounded once. A row's
    result has the same bits whatever rows it is computed with, and by however many threads."""
    out = x.new_empty(len(x), len(weight))
    run(x, weight, bias, out, None, 1)
    return out


def row_parallel_native(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, num_ranks: int
) -> torch.Tensor:
    """The same of a matrix whose columns are sharded over ranks: the result is partial and in float32. That of one rank is
    whole and in bfloat16, and has the bits of the sum over two or four."""
    num_parts = parts_of(x.shape[1], num_ranks)
    if num_ranks == 1:
        out = x.new_empty(len(x), len(weight))
        run(x, weight, bias, out, None, num_parts)
        return out
    partial = x.new_empty(len(x), len(weight), dtype=torch.float32)
    run(x, weight, bias, None, partial, num_parts)
    return partial


def wide_linear_native(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As `linear_native`, not rounded: in float32."""
    out = x.new_empty(len(x), len(weight), dtype=torch.float32)
    run(x, weight, None, None, out, 1)
    return out


def run(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
    partial: torch.Tensor | None,
    num_parts: int,
) -> None:
    """The operator, into `out` or `partial`."""
    (num_tokens, width), num_outputs = x.shape, weight.shape[0]
    assert weight.shape[1] == width and x.dtype == weight.dtype == torch.bfloat16
    # Rows may be further apart than they are long. Bound to names: the tensors must live until the operator returns.
    x, weight = with_whole_rows(x), with_whole_rows(weight)
    bias = None if bias is None else bias.contiguous()
    load_operators()[NAME](
        x.data_ptr(),
        weight.data_ptr(),
        *(None if each is None else each.data_ptr() for each in (bias, out, partial)),
        *(num_tokens, num_outputs, width, num_parts, x.stride(0), weight.stride(0)),
        torch.get_num_threads(),
    )


def with_whole_rows(matrix: torch.Tensor) -> torch.Tensor:
    """The same numbers, those of a row one behind the other."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
