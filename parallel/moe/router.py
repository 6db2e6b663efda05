"""The router: which experts a token goes to, and with which weights. Arithmetic as in `transformers`, family by family.

Legend: T tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from ..cpu_ops.activation import sigmoid
from ..cpu_ops.linear import has_native_linear, wide_linear_native
from ..weight_format import WeightFormat
from ..weights import ShardedWeight

# What `transformers` adds to the sum that sigmoid scores are divided by.
EPSILON = 1e-20
# Experts of a group whose scores add up to the group's.
NUM_BEST_OF_GROUP = 2


@dataclass(frozen=True)
class RouterConfig:
    """How a family of models chooses K of E experts.

    `scoring` is "softmax" (over all experts in float32, then the best K), "softmax_of_chosen" (the best K logits, then a
    softmax over those) or "sigmoid" (logits and scores in float32). `bias`: the logits have one. With `correction` a bias
    joins the scores where experts are chosen, and nowhere else. Experts lie in `num_groups` groups, of which the
    `num_chosen_groups` best compete, by the sum of their two best scores.
    """

    num_experts: int
    top_k: int
    scoring: Literal["softmax", "softmax_of_chosen", "sigmoid"] = "softmax"
    renormalises: bool = True
    bias: bool = False
    correction: bool = False
    num_groups: int = 1
    num_chosen_groups: int = 1
    scale: float = 1.0
    # Weights that stay in float32, whatever the model computes in.
    wide_weights: bool = False

    def checked(self) -> RouterConfig:
        """
        Raises:
            ValueError: there is no such choice.
        """
        if not 0 < self.top_k <= self.num_experts:
            raise ValueError(f"num_experts_per_tok={self.top_k}: must be 1 to {self.num_experts}")
        if self.bias and self.scoring == "sigmoid":
            raise ValueError("a router that scores by a sigmoid has no bias of its logits")
        if self.num_groups == 1:
            return replace(self, num_chosen_groups=1)
        per_group, left = divmod(self.num_experts, self.num_groups)
        if left or per_group < NUM_BEST_OF_GROUP:
            raise ValueError(f"n_group={self.num_groups}: must divide {self.num_experts} experts, two or more a group")
        if not 0 < self.num_chosen_groups <= self.num_groups or self.top_k > self.num_chosen_groups * per_group:
            raise ValueError(
                f"topk_group={self.num_chosen_groups}: {self.top_k} of {per_group} experts in each of {self.num_groups} "
                "groups cannot be chosen so"
            )
        return self

    def weights_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """That of the weights in a model of `dtype`."""
        return torch.float32 if self.wide_weights else dtype


# See `choose_torch`.
Choose = Callable[
    [torch.Tensor, RouterConfig, torch.Tensor | None, torch.Tensor | None, torch.dtype],
    tuple[torch.Tensor, torch.Tensor],
]


@dataclass(frozen=True)
class RouterOutput:
    """Experts of every token, the best first: ids [T, K] int64 and their weights [T, K]."""

    ids: torch.Tensor
    weights: torch.Tensor


class TopKRouter(nn.Module):
    """A linear layer and the choice by its logits, which sigmoid scores need in float32."""

    def __init__(self, hidden_size: int, config: RouterConfig, *, weight_format: WeightFormat) -> None:
        super().__init__()
        self.config = config
        self._choose = select_choose(weight_format.device)
        self._is_wide = config.scoring == "sigmoid"
        self._weights_dtype = config.weights_dtype(weight_format.dtype)
        self._linear = weight_format.linear()
        self.weight = weight_format.empty(config.num_experts, hidden_size)
        self.bias = weight_format.empty(config.num_experts) if config.bias else None
        wide = replace(weight_format, dtype=torch.float32)
        self.correction = wide.empty(config.num_experts) if config.correction else None

    def sharded_weights(self, prefix: str) -> dict[str, ShardedWeight]:
        """Every rank holds all of it."""
        parts = {
            "weight": self.weight,
            "bias": self.bias,
            "e_score_correction_bias": self.correction,
        }
        return {
            f"{prefix}.{name}": ShardedWeight.of(tuple(part.shape), part.data)
            for name, part in parts.items()
            if part is not None
        }

    def forward(self, hidden: torch.Tensor, record: torch.Tensor | None = None) -> RouterOutput:
        """Route hidden states [T, D]; the ids are also written to `record` [T, K], of any integer dtype."""
        logits = wide_logits(hidden, self.weight) if self._is_wide else self._linear(hidden, self.weight, self.bias)
        return RouterOutput(*self._choose(logits, self.config, self.correction, record, self._weights_dtype))


def wide_logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[T, D] times the transpose of [E, D], in float32: products of 16-bit numbers are exact in it."""
    if hidden.device.type == "cuda" and hidden.dtype == weight.dtype != torch.float32:
        # Nothing is cast.
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    if hidden.device.type == "cpu" and hidden.dtype == weight.dtype and has_native_linear(weight.dtype):
        return wide_linear_native(hidden, weight)
    return F.linear(hidden.float(), weight.float())


def choose_torch(
    logits: torch.Tensor,
    config: RouterConfig,
    correction: torch.Tensor | None,
    record: torch.Tensor | None,
    weights_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Router logits [T, E] -> ids [T, K] int64, also written to `record`, and weights [T, K] in `weights_dtype`.

    Where a softmax meets NaN or +inf, the weights are NaN; the ids are distinct experts all the same, as everything that
    sorts and counts by them needs.
    """
    scores = scores_of(logits, config)
    ids = torch.topk(choice_scores(scores, config, correction), config.top_k, dim=-1).indices
    if record is not None:
        record.copy_(ids)
    weights = scores.gather(1, ids)
    if config.scoring == "softmax_of_chosen":
        weights = torch.softmax(weights, dim=-1, dtype=weights.dtype)
    elif config.renormalises:
        total = weights.sum(dim=-1, keepdim=True)
        weights = weights / (total + EPSILON if config.scoring == "sigmoid" else total)
    if config.scale != 1.0:
        weights = weights * config.scale
    return ids, weights.to(weights_dtype)


def scores_of(logits: torch.Tensor, config: RouterConfig) -> torch.Tensor:
    """What weights are made of, [T, E]."""
    if config.scoring == "softmax":
        return torch.softmax(logits, dim=-1, dtype=torch.float32)
    return sigmoid(logits) if config.scoring == "sigmoid" else logits


def choice_scores(scores: torch.Tensor, config: RouterConfig, correction: torch.Tensor | None) -> torch.Tensor:
    """What experts are chosen by, [T, E]: -inf in groups that do not compete."""
    if correction is not None:
        scores = scores + correction
    if config.num_groups == 1:
        return scores
    groups = scores.unflatten(-1, (config.num_groups, -1))
    sums = groups.topk(NUM_BEST_OF_GROUP, dim=-1).values.sum(dim=-1)
    best = sums.topk(config.num_chosen_groups, dim=-1).indices
    is_out = torch.ones_like(sums, dtype=torch.bool).scatter_(-1, best, False)
    return groups.masked_fill(is_out[..., None], float("-inf")).flatten(-2)


def select_choose(device: torch.device) -> Choose:
    """The fastest for the device."""
    if device.type == "cpu":
        return choose_torch
    # Triton comes with torch's CUDA builds alone.
    from .router_triton import choose_triton  # noqa: PLC0415

    return choose_triton
