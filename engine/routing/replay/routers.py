"""How each family of routers turns dense scores and chosen experts into weights: the one part of replay that differs.

Every rule gathers from the scores of *all* experts and then does what the router's own forward does after its top-k, in the
same order and types. So the weights of a router's own choice come out bit for bit, and the gradient reaches the scores of
every replayed expert, also of one that is no longer among the top-k.

Legend: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# (router, logits [T, E], ids [T, K]) -> weights [T, K]. A router's class does not declare its settings.
WeightsRule = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]
# (router, logits [T, E]) -> scores that experts are chosen by [T, E], before groups of them compete.
ChoiceRule = Callable[[Any, torch.Tensor], torch.Tensor]


def chosen_by_logits(router: Any, logits: torch.Tensor) -> torch.Tensor:
    return logits


@dataclass(frozen=True)
class RouterKind:
    """A router class. `returns_logits`: it returns (logits, weights, ids), else (weights, ids, tokens per expert).
    `is_grouped`: groups of experts compete first; then a choice comes in no order."""

    weights: WeightsRule
    returns_logits: bool = True
    choice: ChoiceRule = chosen_by_logits
    is_grouped: bool = False


def softmax_weights(router: Any, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Qwen3-MoE, Qwen2-MoE, OLMoE: softmax over all experts, renormalised where the configuration says so."""
    weights = torch.softmax(logits, dim=-1, dtype=torch.float).gather(1, ids)
    if router.norm_topk_prob:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights.to(logits.dtype)


def normalised_weights(router: Any, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Qwen3-VL-MoE: softmax over all experts, always renormalised."""
    return mixtral_weights(router, logits, ids).to(logits.dtype)


def mixtral_weights(router: Any, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mixtral: softmax, always renormalised, left in float32."""
    weights = torch.softmax(logits.float(), dim=-1).gather(1, ids)
    return weights / weights.sum(dim=-1, keepdim=True)


def deepseek_v3_weights(router: Any, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """DeepSeek-V3, GLM-4-MoE: sigmoid. Correction bias and groups decide who is chosen, never what a choice weighs."""
    weights = logits.sigmoid().gather(1, ids)
    if router.norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * router.routed_scaling_factor


def corrected_scores(router: Any, logits: torch.Tensor) -> torch.Tensor:
    """DeepSeek-V3's choice."""
    return logits.sigmoid() + router.e_score_correction_bias


def gpt_oss_weights(router: Any, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """gpt-oss: softmax over the chosen alone."""
    return torch.softmax(logits.gather(1, ids), dim=1, dtype=logits.dtype)


def autoep_weights(router: Any, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """DeepSpeed's AutoEP, which stands in for the router of the model it was given."""
    if router.score_func == "sigmoid":
        scores = torch.sigmoid(logits.to(torch.float32))
    else:
        assert router.score_func == "softmax", router.score_func
        scores = torch.softmax(logits.to(torch.float32), dim=1)
    weights = scores.gather(1, ids)
    if router.route_norm:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * router.route_scale


_TRANSFORMERS = "transformers.models"
_GROUPED = RouterKind(deepseek_v3_weights, choice=corrected_scores, is_grouped=True)
# By name, so that neither DeepSpeed nor the families that are not used are imported.
ROUTER_KINDS: dict[str, RouterKind] = {
    f"{_TRANSFORMERS}.qwen3_moe.modeling_qwen3_moe.Qwen3MoeTopKRouter": RouterKind(softmax_weights),
    f"{_TRANSFORMERS}.qwen3_vl_moe.modeling_qwen3_vl_moe.Qwen3VLMoeTextTopKRouter": RouterKind(normalised_weights),
    f"{_TRANSFORMERS}.qwen2_moe.modeling_qwen2_moe.Qwen2MoeTopKRouter": RouterKind(softmax_weights),
    f"{_TRANSFORMERS}.olmoe.modeling_olmoe.OlmoeTopKRouter": RouterKind(softmax_weights),
    f"{_TRANSFORMERS}.mixtral.modeling_mixtral.MixtralTopKRouter": RouterKind(mixtral_weights),
    f"{_TRANSFORMERS}.deepseek_v3.modeling_deepseek_v3.DeepseekV3TopkRouter": _GROUPED,
    f"{_TRANSFORMERS}.glm4_moe.modeling_glm4_moe.Glm4MoeTopkRouter": _GROUPED,
    f"{_TRANSFORMERS}.glm4_moe_lite.modeling_glm4_moe_lite.Glm4MoeLiteTopkRouter": _GROUPED,
    f"{_TRANSFORMERS}.gpt_oss.modeling_gpt_oss.GptOssTopKRouter": RouterKind(gpt_oss_weights),
    "deepspeed.moe.ep_router.TokenChoiceTopKRouter": RouterKind(autoep_weights, returns_logits=False),
}
SUPPORTED = (
    "Qwen3-MoE, Qwen3-VL-MoE, Qwen2-MoE, Mixtral, OLMoE, DeepSeek-V3, GLM-4-MoE, gpt-oss, DeepSpeed's AutoEP of these"
)


def qualified_names(module: nn.Module) -> list[str]:
    """The module's class and its bases: wrappers such as FSDP put a subclass of their own in front."""
    return [f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__]


def router_kind(module: nn.Module) -> RouterKind | None:
    """The kind of a router; None for any other module."""
    for name in qualified_names(module):
        if name in ROUTER_KINDS:
            return ROUTER_KINDS[name]
    return None


def router_weights(router: Any, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The weights [T, K] that `router`, with scores `logits` [T, E], gives the experts `ids` [T, K]."""
    kind = router_kind(router)
    assert kind is not None, f"{type(router).__name__} is no router that is known"
    return kind.weights(router, logits, ids)
