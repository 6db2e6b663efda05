"""Router and layer against `transformers`' Qwen3-MoE block, whose arithmetic they must have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, Glm4MoeConfig, GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from waybill.parallel.cpu_ops.experts import has_native_experts
from waybill.parallel.dp_attention import ReplicatedTokens
from waybill.parallel.mesh import Axis
from waybill.parallel.moe.dispatch import RecordedRows, ReplicatedDispatcher
from waybill.parallel.moe.experts import Experts
from waybill.parallel.moe.layer import MoeLayer
from waybill.parallel.moe.router import RouterConfig, TopKRouter, choose_torch
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
    config = RouterConfig(gate.num_experts, gate.top_k, renormalises=gate.norm_topk_prob)
    router = TopKRouter(gate.hidden_dim, config, **options)
    router.sharded_weights("gate")["gate.weight"].load(gate.weight)
    sizes = (gate.num_experts, gate.hidden_dim, theirs.intermediate_dim)
    experts = Experts(*sizes, Axis.single(), split="ep", backend=backend, **options)
    for expert_id in range(gate.num_experts):
        gate_weight, up_weight = theirs.gate_up_proj[expert_id].chunk(2)
        for part, weight in (("gate", gate_weight), ("up", up_weight), ("down", theirs.down_proj[expert_id])):
            experts.sharded_weight(expert_id, part).load(weight)
    return MoeLayer(7, router, ReplicatedDispatcher(Axis.single()), experts)


class Recorder:
    def __init__(self) -> None:
        self.records: list[tuple[int, RecordedRows]] = []

    def slot(self, moe_layer_index: int) -> RecordedRows:
        rows = RecordedRows(torch.full((40, 3), 255, dtype=torch.uint8), weights=torch.full((40, 3), -1.0))
        self.records.append((moe_layer_index, rows))
        return rows


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_no_number_choose_distinct_experts(dtype: torch.dtype, norm_topk_prob: bool) -> None:
    """They are recorded, sorted and counted by; the weights say that the row is spoilt, and no other row changes."""
    logits = torch.randn(7, 300).to(dtype)
    records = [torch.full((7, 8), 65535, dtype=torch.uint16) for _ in range(2)]
    config = RouterConfig(300, 8, renormalises=norm_topk_prob)
    expected = choose_torch(logits, config, None, records[0], dtype)
    logits[1, 5], logits[2], logits[3, 0], logits[4] = float("nan"), float("nan"), float("inf"), float("-inf")
    ids, weights = choose_torch(logits, config, None, records[1], dtype)
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


SIZES: dict[str, Any] = {"hidden_size": 64, "num_experts_per_tok": 3, "num_local_experts": 8}
GROUPS: dict[str, Any] = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7, "n_routed_experts": 16}
GROUPED = RouterConfig(
    16, 3, "sigmoid", correction=True, num_groups=4, num_chosen_groups=2, scale=1.7, wide_weights=True
)
OTHER_ROUTERS: dict[str, tuple[Any, RouterConfig]] = {
    "mixtral": (lambda: MixtralTopKRouter(MixtralConfig(**SIZES)), RouterConfig(8, 3, wide_weights=True)),
    "gpt_oss": (lambda: GptOssTopKRouter(GptOssConfig(**SIZES)), RouterConfig(8, 3, "softmax_of_chosen", bias=True)),
    "glm4_moe": (
        lambda: Glm4MoeTopkRouter(Glm4MoeConfig(hidden_size=64, num_experts_per_tok=3, **GROUPS)),
        GROUPED,
    ),
    "deepseek_v3": (
        lambda: DeepseekV3TopkRouter(DeepseekV3Config(hidden_size=64, num_experts_per_tok=3, **GROUPS)),
        GROUPED,
    ),
    "unnormalised": (
        lambda: Glm4MoeTopkRouter(Glm4MoeConfig(hidden_size=64, num_experts_per_tok=3, **GROUPS, norm_topk_prob=False)),
        replace(GROUPED, renormalises=False),
    ),
}


@pytest.mark.parametrize("family", OTHER_ROUTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routers_of_other_families_are_those_of_transformers(dtype: torch.dtype, family: str) -> None:
    """To the bit; where the reference gives its choice in no order, so does the sum that weights are divided by."""
    torch.manual_seed(0)
    make_theirs, config = OTHER_ROUTERS[family]
    theirs = make_theirs().requires_grad_(False)
    for name, tensor in theirs.state_dict().items():
        tensor.normal_(std=1 / 8)
        tensor.copy_(tensor if name == "e_score_correction_bias" else tensor.to(dtype))
    theirs.weight.data = theirs.weight.data.to(dtype)
    if config.bias:
        theirs.bias.data = theirs.bias.data.to(dtype)
    ours = TopKRouter(64, config.checked(), weight_format=WeightFormat(dtype, torch.device("cpu")))
    weights = ours.sharded_weights("gate")
    assert weights.keys() == {f"gate.{name}" for name in theirs.state_dict()}
    for name, tensor in theirs.state_dict().items():
        weights[f"gate.{name}"].load(tensor)
    x = torch.randn(40, 64).to(dtype)
    routed = ours(x)
    logits, scores, ids = theirs(x)
    assert routed.weights.dtype == scores.dtype
    if config.scoring != "sigmoid":
        assert torch.equal(routed.ids, ids)
        assert torch.equal(routed.weights, scores)
        return
    wanted = logits.sigmoid() + theirs.e_score_correction_bias
    order = wanted.gather(1, ids).argsort(dim=-1, descending=True)
    assert torch.equal(routed.ids, ids.gather(1, order))
    torch.testing.assert_close(routed.weights, scores.gather(1, order), rtol=3e-7, atol=0.0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RouterConfig(8, 9), "num_experts_per_tok=9"),
        (RouterConfig(9, 2, num_groups=2), "n_group=2"),
        (RouterConfig(8, 2, num_groups=8), "n_group=8"),
        (RouterConfig(8, 3, num_groups=4, num_chosen_groups=1), "topk_group=1"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(config: RouterConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.checked()


@pytest.mark.parametrize("backend", ["auto", "torch_reference"])
def test_layer_is_that_of_transformers_and_tells_its_choice(backend: str) -> None:
    torch.manual_seed(1)
    block = hf_block(torch.float32, norm_topk_prob=True)
    layer, recorder, x = our_layer(block, backend), Recorder(), torch.randn(40, 64)
    out = layer(x, WHOLE, recorder).complete()
    torch.testing.assert_close(out, block(x[None])[0], rtol=1e-5, atol=1e-5)
    ((index, rows),) = recorder.records
    assert index == 7
    assert torch.equal(rows.ids.long(), block.gate(x)[2])
    assert torch.equal(rows.weights, block.gate(x)[1])


def test_layer_in_bfloat16_rounds_where_transformers_does() -> None:
    """Only the order of sums may differ: a rounding left out or added shows as a larger distance."""
    torch.manual_seed(2)
    block = hf_block(torch.bfloat16, norm_topk_prob=True)
    x = torch.randn(40, 64).bfloat16()
    out, expected = our_layer(block, "auto")(x, WHOLE).complete(), block(x[None])[0]
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=2**-7 * expected.abs().max().item())


@pytest.mark.skipif(not has_native_experts(torch.bfloat16, 64, 32), reason="needs AVX2 and a C++ compiler")
def test_a_token_has_the_same_bits_and_experts_alone_and_in_any_batch() -> None:
    """Router and experts in bfloat16, through the CPU operators."""
    torch.manual_seed(3)
    layer, x = our_layer(hf_block(torch.bfloat16, norm_topk_prob=True), "auto"), torch.randn(40, 64).bfloat16()
    routed, out = layer.router(x), layer(x, WHOLE).complete()
    for size in (1, 2, 3, 5, 8, 39):
        for rows in (slice(size), slice(40 - size, 40)):
            assert torch.equal(layer.router(x[rows]).ids, routed.ids[rows])
            assert torch.equal(layer.router(x[rows]).weights, routed.weights[rows])
            assert torch.equal(layer(x[rows], WHOLE).complete(), out[rows]), size


def test_a_shared_expert_joins_the_sum() -> None:
    torch.manual_seed(2)
    block = hf_block(torch.float32, norm_topk_prob=True)
    layer = our_layer(block, "auto")
    x = torch.randn(5, 64)
    alone = layer(x, WHOLE).complete()
    layer.shared = torch.nn.Linear(64, 64)
    torch.testing.assert_close(layer(x, WHOLE).complete(), alone + layer.shared(x))
