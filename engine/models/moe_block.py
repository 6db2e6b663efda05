"""The MoE layer of a model, and its tensors by their names in a checkpoint."""

from __future__ import annotations

from ...parallel.moe.experts import Experts
from ...parallel.moe.layer import MoeLayer
from ...parallel.moe.router import TopKRouter
from ...parallel.weights import ShardedWeight
from .causal_lm import FusedWeight
from .model_context import ModelContext


def make_moe_layer(moe_index: int, context: ModelContext) -> MoeLayer:
    """The MoE layer, its experts over the expert-parallel axis."""
    config, moe = context.config, context.config.moe
    router = TopKRouter(
        config.hidden_size,
        moe.num_experts,
        moe.top_k,
        norm_topk_prob=moe.norm_topk_prob,
        weight_format=context.weight_format,
    )
    experts = Experts(
        moe.num_experts,
        config.hidden_size,
        moe.intermediate_size,
        context.mesh.ep,
        split=context.moe_split,
        backend=context.experts_backend,
        weight_format=context.weight_format,
    )
    return MoeLayer(moe_index, router, context.make_dispatcher(), experts)


def expert_name(prefix: str, expert: int, part: str) -> str:
    """On the hub: one tensor per expert and projection."""
    return f"{prefix}.experts.{expert}.{part}_proj.weight"


def moe_weights(layer: MoeLayer, num_experts: int, prefix: str) -> dict[str, ShardedWeight]:
    weights = {f"{prefix}.gate.weight": layer.router.sharded_weight()}
    for expert in range(num_experts):
        for part in ("gate", "up", "down"):
            weights[expert_name(prefix, expert, part)] = layer.experts.sharded_weight(expert, part)
    return weights


def fused_moe_weights(layer: MoeLayer, num_experts: int, prefix: str) -> dict[str, FusedWeight]:
    """As `transformers` holds them in memory, and a trainer may send them."""
    names = {part: [expert_name(prefix, e, part) for e in range(num_experts)] for part in ("gate", "up", "down")}
    return {
        f"{prefix}.experts.gate_up_proj": FusedWeight(
            layer.experts.fused_weight("gate_up"), frozenset(names["gate"] + names["up"])
        ),
        f"{prefix}.experts.down_proj": FusedWeight(layer.experts.fused_weight("down"), frozenset(names["down"])),
    }
