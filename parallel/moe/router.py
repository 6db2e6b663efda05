"""The router: which experts a token goes to, and with which weights. Arithmetic as in `transformers`' Qwen3-MoE.

Legend: T tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..weight_format import WeightFormat
from ..weights import ShardedWeight

# See `choose_torch`.
Choose = Callable[[torch.Tensor, int, bool, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]


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
        weight_format: WeightFormat,
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self._norm_topk_prob = norm_topk_prob
        self._choose = select_choose(weight_format.device)
        self._linear = weight_format.linear()
        self.weight = weight_format.empty(num_experts, hidden_size)

    def sharded_weight(self) -> ShardedWeight:
        return ShardedWeight.of(tuple(self.weight.shape), self.weight.data)

    def forward(self, hidden: torch.Tensor, record: torch.Tensor | None = None) -> RouterOutput:
        """Route hidden states [T, D]; the ids are also written to `record` [T, K], of any integer dtype."""
        logits = self._linear(hidden, self.weight, None)
        return RouterOutput(*self._choose(logits, self.top_k, self._norm_topk_prob, record))


def renormalise(weights: torch.Tensor, norm_topk_prob: bool) -> torch.Tensor:
    return weights / weights.sum(dim=-1, keepdim=True) if norm_topk_prob else weights


def choose_torch(
    logits: torch.Tensor, top_k: int, norm_topk_prob: bool, record: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Router logits [T, E] -> ids [T, K] int64, also written to `record`, and weights [T, K] in the logits' dtype.

    Where a logit is NaN or +inf, the weights are NaN; the ids are distinct experts all the same, as everything that sorts
    and counts by them needs.
    """
    weights, ids = torch.topk(torch.softmax(logits, dim=-1, dtype=torch.float32), top_k, dim=-1)
    if record is not None:
        record.copy_(ids)
    return ids, renormalise(weights, norm_topk_prob).to(logits.dtype)


def select_choose(device: torch.device) -> Choose:
    """The fastest for the device."""
    if device.type == "cpu":
        return choose_torch
    # Triton comes with torch's CUDA builds alone.
    from .router_triton import choose_triton  # noqa: PLC0415

    return choose_triton
