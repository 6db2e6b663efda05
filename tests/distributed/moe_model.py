"""The same small MoE layer twice: `transformers`' block, and ours with its weights."""

from __future__ import annotations

import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from waybill.parallel.mesh import Axis
from waybill.parallel.moe.dispatch import ReplicatedDispatcher
from waybill.parallel.moe.experts import Experts
from waybill.parallel.moe.layer import MoeLayer
from waybill.parallel.moe.router import TopKRouter

CPU = torch.device("cpu")


def hf_moe_block(dtype: torch.dtype, *, norm_topk_prob: bool = True) -> Qwen3MoeSparseMoeBlock:
    """8 experts, top-3, hidden 64, intermediate 32; random weights from torch's current seed."""
    config = Qwen3MoeConfig(
        hidden_size=64, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=3, norm_topk_prob=norm_topk_prob
    )
    config._experts_implementation = "eager"
    block = Qwen3MoeSparseMoeBlock(config)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn_like(parameter) / 8)
    return block.to(dtype).requires_grad_(False)


def moe_layer(block: Qwen3MoeSparseMoeBlock, axis: Axis, *, split: str, backend: str) -> MoeLayer:
    """Our layer with this rank's shard of the block's weights."""
    gate, experts = block.gate, block.experts
    options = {"dtype": gate.weight.dtype, "device": CPU}
    router = TopKRouter(
        gate.hidden_dim, gate.num_experts, gate.top_k, norm_topk_prob=gate.norm_topk_prob, **options
    )
    router.load_weight(gate.weight)
    local = Experts(
        gate.num_experts, gate.hidden_dim, experts.intermediate_dim, axis, split=split, backend=backend, **options
    )
    for expert_id in range(gate.num_experts):
        gate_weight, up_weight = experts.gate_up_proj[expert_id].chunk(2)
        for part, weight in (("gate", gate_weight), ("up", up_weight), ("down", experts.down_proj[expert_id])):
            local.load_weight(weight, expert_id, part)
    return MoeLayer(0, router, ReplicatedDispatcher(axis), local)
