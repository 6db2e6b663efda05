"""The experts of one rank in bfloat16, `experts_bf16.cpp`.

Legend: T tokens, D hidden, F experts on this rank, K experts per token, I intermediate width on this rank.
"""

from __future__ import annotations

import torch

from .library import NUM_PARTS, has_operator, load_operators

NAME = "waybill_experts_bf16"
# The widths that the operator takes are multiples of the products of one instruction.
WIDTH_MULTIPLE = 32


def has_native_experts(dtype: torch.dtype, hidden_size: int, intermediate_size: int) -> bool:
    """Whether `experts_native` can run: bfloat16, widths that are multiples of 32, and a machine for the operator."""
    if dtype != torch.bfloat16 or hidden_size % WIDTH_MULTIPLE or intermediate_size % WIDTH_MULTIPLE:
        return False
    return has_operator(NAME)


def experts_native(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    num_ranks: int = 1,
) -> torch.Tensor:
    """One pass over the weights, no copy of tokens. A token's result does not depend on what it is computed with. Where the
    experts are spread over ranks it is partial and in float32; that of one rank has the bits of the sum over two."""
    (num_tokens, width), top_k, (num_local, _, intermediate) = hidden.shape, ids.shape[1], down.shape
    activated = hidden.new_empty(num_tokens * top_k, intermediate)
    num_parts = NUM_PARTS if num_ranks == 1 and num_local % NUM_PARTS == 0 else 1
    sums = torch.zeros(num_parts, num_tokens, width)
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format) if num_ranks == 1 else None
    # Bound to names: the tensors must live until the operator returns.
    tensors = [x.contiguous() for x in (hidden, ids, weights.float(), gate_up, down)] + [activated, sums]
    load_operators()[NAME](
        *(x.data_ptr() for x in tensors),
        None if out is None else out.data_ptr(),
        *(num_tokens, width, num_local, top_k, intermediate, num_parts),
        torch.get_num_threads(),
    )
    return sums[0] if out is None else out
