"""Root-mean-square norms in bfloat16, `rms_norm_bf16.cpp`.

Legend: T tokens, H heads, C columns of a row.
"""

from __future__ import annotations

import torch

from .library import has_operator, load_operators

NAME, SUMS = "waybill_rms_norm_bf16", "waybill_sums_of_squares_bf16"


def has_native_rms_norm() -> bool:
    """Whether the functions of this file can run, of tensors in bfloat16."""
    return has_operator(NAME)


def rms_norm_native(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Of the rows of [T, C] or [T, H, C], which may be further apart than they are long, by a weight [C], in bfloat16 or in
    float32."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    heads = x if x.dim() == 3 else x[:, None]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    run(heads, None, None, weight, out, eps)
    return out


def add_rms_norm_native(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x + residual [T, C], and that sum."""
    x, residual = x.contiguous(), residual.contiguous()
    total, out = torch.empty_like(x), torch.empty_like(x)
    run(x[:, None], residual, total, weight, out, eps)
    return out, total


def sums_of_squares_native(x: torch.Tensor, num_parts: int) -> torch.Tensor:
    """Of so many equal parts of each row of [T, C], in float32: [T, num_parts]."""
    assert x.dtype == torch.bfloat16 and x.stride(1) == 1 and x.shape[1] % num_parts == 0
    out = torch.empty(len(x), num_parts)
    load_operators()[SUMS](x.data_ptr(), out.data_ptr(), len(x), num_parts, x.shape[1] // num_parts, x.stride(0))
    return out


def run(
    heads: torch.Tensor,
    residual: torch.Tensor | None,
    total: torch.Tensor | None,
    weight: torch.Tensor,
    out: torch.Tensor,
    eps: float,
) -> None:
    """The operator, for [T, H, C]."""
    assert heads.dtype == torch.bfloat16 and weight.is_contiguous()
    is_wide = weight.dtype == torch.float32
    assert is_wide or weight.dtype == torch.bfloat16
    load_operators()[NAME](
        heads.data_ptr(),
        None if residual is None else residual.data_ptr(),
        None if total is None else total.data_ptr(),
        *((None, weight.data_ptr()) if is_wide else (weight.data_ptr(), None)),
        out.data_ptr(),
        *heads.shape,
        heads.stride(0),
        heads.stride(1),
        eps,
        torch.get_num_threads(),
    )
