"""Router and layer against `transformers`' Qwen3-MoE block, whose arithmetic they must have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from waybill.parallel.dp_attention import ReplicatedTokens
from waybill.parallel.mesh import Axis
from waybill.parallel.moe.dispatch import ReplicatedDispatcher
from waybill.parallel.moe.experts import Experts
from waybill.parallel.moe.layer import MoeLayer
from waybill.parallel.moe.router import TopKRouter, choose_torch
from waybill.parallel.weight_format import WeightFormat

WHOLE = ReplicatedTokens(Axis.single())


def hf_block(dtype: torch.dtype, norm_topk_prob: bool) -> Any:
    """8 experts, top-3, hidden 64, intermediate 32; random weights."""
    config = Qwen3MoeConfig(
        hidden_size=64, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=3, norm_topk_prob=norm_topk_prob
    )
    config._experts_implementation = "eager"
    block = Qwen3MoeSparseMoeBlock(config).to(dtype).requires_grad_(False)
    for parameter in block.parameters():
        parameter.normal_(std=1 / 8)
    return block


def our_layer(block: Any, backend: str) -> MoeLayer:
    gate, theirs = block.gate, block.experts
    options = {"weight_format": WeightFormat(gate.weight.dtype, torch.device("cpu"))}
    router = TopKRouter(gate.hidden_dim, gate.num_experts, gate.top_k, norm_topk_prob=gate.norm_topk_prob, **options)
    router.sharded_weight().load(gate.weight)
    sizes = (gate.num_experts, gate.hidden_dim, theirs.intermediate_dim)
    experts = Experts(*sizes, Axis.single(), split="ep", backend=backend, **options)
    for expert_id in range(gate.num_experts):
        gate_weight, up_weight = theirs.gate_up_proj[expert_id].chunk(2)
        for part, weight in (("gate", gate_weight), ("up", up_weight), ("down", theirs.down_proj[expert_id])):
            experts.sharded_weight(expert_id, part).load(weight)
    return MoeLayer(7, router, ReplicatedDispatcher(Axis.single()), experts)


class Recorder:
    def __init__(self) -> None:
        self.records: list[tuple[int, torch.Tensor]] = []

    def slot(self, moe_layer_index: int) -> torch.Tensor:
        self.records.append((moe_layer_index, torch.full((40, 3), 255, dtype=torch.uint8)))
        return self.records[-1][1]


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_no_number_choose_distinct_experts(dtype: torch.dtype, norm_topk_prob: bool) -> None:
    """They are recorded, sorted and counted by; the weights say that the row is spoilt, and no other row changes."""
    logits = torch.randn(7, 300).to(dtype)
    records = [torch.full((7, 8), 65535, dtype=torch.uint16) for _ in range(2)]
    expected = choose_torch(logits, 8, norm_topk_prob, records[0])
    logits[1, 5], logits[2], logits[3, 0], logits[4] = float("nan"), float("nan"), float("inf"), float("-inf")
    ids, weights = choose_torch(logits, 8, norm_topk_prob, records[1])
    assert ids.min() >= 0 and ids.max() < 300
    assert all(len(set(row)) == 8 for row in ids.tolist())
    assert torch.equal(records[1].long(), ids)
    assert weights[1:5].isnan().all()
    assert torch.equal(ids[[0, 5, 6]], expected[0][[0, 5, 6]])
    assert torch.equal(weights[[0, 5, 6]], expected[1][[0, 5, 6]])


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_router_is_that_of_transformers_to_the_bit(dtype: torch.dtype, norm_topk_prob: bool) -> None:
    torch.manual_seed(0)
    block = hf_block(dtype, norm_topk_prob)
    x = torch.randn(40, 64).to(dtype)
    routed = our_layer(block, "auto").router(x)
    _, weights, ids = block.gate(x)
    assert torch.equal(routed.ids, ids)
    assert torch.equal(routed.weights, weights)


@pytest.mark.parametrize("backend", ["auto", "torch_reference"])
def test_layer_is_that_of_transformers_and_tells_its_ids(backend: str) -> None:
    torch.manual_seed(1)
    block = hf_block(torch.float32, norm_topk_prob=True)
    layer, recorder, x = our_layer(block, backend), Recorder(), torch.randn(40, 64)
    out = layer(x, WHOLE, recorder).complete()
    torch.testing.assert_close(out, block(x[None])[0], rtol=1e-5, atol=1e-5)
    ((index, ids),) = recorder.records
    assert index == 7
    assert torch.equal(ids.long(), block.gate(x)[2])


def test_layer_in_bfloat16_rounds_where_transformers_does() -> None:
    """Only the order of sums may differ: a rounding left out or added shows as a larger distance."""
    torch.manual_seed(2)
    block = hf_block(torch.bfloat16, norm_topk_prob=True)
    x = torch.randn(40, 64).bfloat16()
    out, expected = our_layer(block, "auto")(x, WHOLE).complete(), block(x[None])[0]
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=2**-7 * expected.abs().max().item())
