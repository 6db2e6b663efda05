"""The experts of one rank in bfloat16, `experts_bf16.cpp`.

Legend: T tokens, D hidden, F experts on this rank, K experts per token, I intermediate width on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .library import has_operator, load_operators, parts_of
from .scratch import SCRATCH

NAME = "waybill_experts_bf16"
# What the operator takes of hidden and intermediate widths: multiples of these.
HIDDEN_MULTIPLE, INTERMEDIATE_MULTIPLE = 32, 4
# Tokens of an expert that AMX takes at once.
PANEL_ROWS = 16


def has_native_experts(dtype: torch.dtype, hidden_size: int, intermediate_size: int) -> bool:
    """Whether `experts_native` can run: bfloat16, widths that it takes, and a machine for the operator."""
    if dtype != torch.bfloat16 or hidden_size % HIDDEN_MULTIPLE or intermediate_size % INTERMEDIATE_MULTIPLE:
        return False
    return has_operator(NAME)


@dataclass(frozen=True)
class ExpertsSplit:
    """Over how many ranks experts are spread, and whether each has whole ones, or a slice of the intermediate width of
    every one."""

    num_ranks: int = 1
    has_whole: bool = True


ON_ONE_RANK = ExpertsSplit()


@dataclass(frozen=True, eq=False)
class NativeClamp:
    """Of clamped experts: biases [F, 2I] and [F, D], and the numbers of `SwigluClamp`."""

    gate_up_bias: torch.Tensor
    down_bias: torch.Tensor
    alpha: float
    limit: float


def experts_native(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    split: ExpertsSplit = ON_ONE_RANK,
    clamp: NativeClamp | None = None,
) -> torch.Tensor:
    """One pass over the weights. A token's result does not depend on what it is computed with. Where the
    experts are spread over ranks it is partial and in float32; that of one rank has the bits of the sum over two or four,
    split alike."""
    (num_tokens, width), top_k, (num_local, _, intermediate) = hidden.shape, ids.shape[1], down.shape
    num_pairs = num_tokens * top_k
    # A panel of an expert may have one token alone.
    num_rows = num_pairs + (PANEL_ROWS - 1) * min(num_local, num_pairs)
    num_parts = parts_of(num_local if split.has_whole else intermediate, split.num_ranks)
    activated, results, sums = SCRATCH.tensors(
        ((num_rows, intermediate), torch.bfloat16),
        ((num_pairs if split.has_whole else 0, width), torch.bfloat16),
        ((0 if split.has_whole else num_parts, num_tokens, width), torch.float32),
    )
    sums.zero_()
    is_partial = split.num_ranks > 1
    out = torch.empty(num_tokens, width, dtype=torch.float32 if is_partial else torch.bfloat16)
    # Bound to names: the tensors must live until the operator returns.
    tensors = [x.contiguous() for x in (hidden, ids, weights.float(), gate_up, down)]
    biases = [None, None] if clamp is None else [clamp.gate_up_bias.contiguous(), clamp.down_bias.contiguous()]
    load_operators()[NAME](
        *(None if x is None else x.data_ptr() for x in (*tensors, *biases, activated, results, sums)),
        *((None, out.data_ptr()) if is_partial else (out.data_ptr(), None)),
        *(num_tokens, width, num_local, top_k, intermediate, num_parts, not split.has_whole),
        *((0.0, 0.0) if clamp is None else (clamp.alpha, clamp.limit)),
        torch.get_num_threads(),
    )
    return out
