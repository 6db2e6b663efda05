"""Products of each head's rows with a matrix of its own, in bfloat16, `heads_bf16.cpp`.

Legend: T tokens, H heads, R rows and C columns of a head's matrix.
"""

from __future__ import annotations

import torch

from .library import has_operator, load_operators

ABSORB, EXTRACT = "waybill_absorb_bf16", "waybill_extract_bf16"


def has_native_heads(x: torch.Tensor) -> bool:
    """Whether the functions of this file can run."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and has_operator(ABSORB)


def absorb_native(x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """[T, H, R] by matrices [H, R, C]: [T, H, C]. A row has the same bits whatever rows it is computed with."""
    return run(ABSORB, x, matrices, matrices.shape[2])


def extract_native(x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """[T, H, C] by the transposes of matrices [H, R, C]: [T, H, R], in the same way."""
    return run(EXTRACT, x, matrices, matrices.shape[1])


def run(name: str, x: torch.Tensor, matrices: torch.Tensor, width: int) -> torch.Tensor:
    assert x.dtype == matrices.dtype == torch.bfloat16 and matrices.stride(2) == 1
    # Bound to a name: the tensor must live until the operator returns.
    x = x if x.stride(2) == 1 else x.contiguous()
    out = x.new_empty(*x.shape[:2], width)
    load_operators()[name](
        *(tensor.data_ptr() for tensor in (x, matrices, out)),
        *(len(x), *matrices.shape, x.stride(0), x.stride(1), matrices.stride(0), matrices.stride(1)),
        torch.get_num_threads(),
    )
    return out
