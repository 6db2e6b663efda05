"""The logarithm of sums of exponentials, of logits whose columns ranks share, `log_sum_exp.cpp`.

Legend: B rows, C columns on this rank, P parts of them, V columns of all ranks.
"""

from __future__ import annotations

import torch

from .library import NUM_PARTS, has_operator, load_operators

NAME = "waybill_log_sum_exp"


def has_native_log_sum_exp(x: torch.Tensor) -> bool:
    """Whether what is made of these logits is the operator's to sum: those of a model in bfloat16, on a CPU."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and has_operator(NAME)


def parts_of_columns(num_columns: int, num_ranks: int) -> int:
    """P of each of so many ranks, which share V columns: one, two and four ranks have the same parts where four divide V,
    else one rank has those of two."""
    if num_columns % NUM_PARTS == 0 and NUM_PARTS % num_ranks == 0:
        return NUM_PARTS // num_ranks
    return 2 if num_ranks == 1 else 1


def partial_sums_native(x: torch.Tensor, num_parts: int) -> torch.Tensor:
    """Of the parts of rows [B, C], in float32: their largest numbers and the sums of exponentials of what others are
    relative to these, [2 P, B]. A row has the same bits in any batch."""
    assert x.dtype == torch.float32 and x.stride(1) == 1
    (num_rows, num_columns), out = x.shape, torch.empty(2, len(x), num_parts)
    width = max(1, -(-num_columns // num_parts))
    load_operators()[NAME](
        x.data_ptr(),
        *(part.data_ptr() for part in out),
        *(num_rows, num_columns, num_parts, width, x.stride(0)),
        torch.get_num_threads(),
    )
    return out.transpose(1, 2).reshape(2 * num_parts, num_rows)


def log_of_sums(partial: torch.Tensor) -> torch.Tensor:
    """Those of all parts in order, [n, 2 P, B], to the logarithms [B]. In float64, since torch computes the last numbers
    of a tensor by another function: rounded to float32 both are the same."""
    largest, sums = (each.flatten(0, 1).double() for each in partial.chunk(2, dim=1))
    most = largest.amax(dim=0)
    total = torch.zeros_like(most)
    for base, one in zip(largest, sums, strict=True):
        total += one * (base - most).exp()
    return (most + total.log()).float()
