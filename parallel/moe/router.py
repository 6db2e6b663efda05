"""The router: which experts a token goes to, and with which weights. Arithmetic as in `transformers`' Qwen3-MoE.

Recording and replaying routes are two policies of the seam `select`: it turns dense scores into ids; the weights are
always gathered from the dense scores and renormalised afterwards.

Legend: T tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..weights import TensorSource, check_shape, empty_weight

# Dense scores [T, E] float32 -> ids [T, K] int64.
Select = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class RouterOutput:
    """Experts of every token, most likely first: ids [T, K] int64 and their weights [T, K] in the model's dtype."""

    ids: torch.Tensor
    weights: torch.Tensor


class TopKRouter(nn.Module):
    """Softmax over all experts in float32, then the best K, renormalised where the model says so."""

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        norm_topk_prob: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self._norm_topk_prob = norm_topk_prob
        self.weight = empty_weight(num_experts, hidden_size, dtype=dtype, device=device)

    def load_weight(self, source: TensorSource) -> None:
        check_shape(source, tuple(self.weight.shape))
        self.weight.data.copy_(source[:])

    def forward(self, hidden: torch.Tensor, select: Select | None = None) -> RouterOutput:
        """Route hidden states [T, D]."""
        scores = torch.softmax(F.linear(hidden, self.weight), dim=-1, dtype=torch.float32)
        if select is None:
            weights, ids = torch.topk(scores, self.top_k, dim=-1)
        else:
            ids = select(scores)
            weights = scores.gather(1, ids)
        if self._norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return RouterOutput(ids, weights.to(hidden.dtype))
