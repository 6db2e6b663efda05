"""Every implementation of the experts against the reference, and both splits against the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from waybill.parallel.cpu_ops.experts import experts_native, has_native_experts
from waybill.parallel.cpu_ops.library import SWITCH, supported_sets
from waybill.parallel.mesh import Axis
from waybill.parallel.moe.activation import ClampedExperts, SwigluClamp
from waybill.parallel.moe.experts import (
    Experts,
    ExpertsFunction,
    experts_by_group,
    experts_torch_reference,
    select_experts_function,
)
from waybill.parallel.weight_format import WeightFormat

CPU = torch.device("cpu")
NUM_EXPERTS, TOP_K, HIDDEN, WIDTH = 6, 3, 96, 64

needs_kernel = pytest.mark.skipif(
    not has_native_experts(torch.bfloat16, HIDDEN, WIDTH), reason="needs AVX2 and a C++ compiler"
)


def native_on(instruction_set: str) -> ExpertsFunction:
    def run(*arguments: torch.Tensor) -> torch.Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(SWITCH, instruction_set)
            return experts_native(*arguments)

    return run


NATIVE = [pytest.param(native_on(name), id=name, marks=needs_kernel) for name in supported_sets()]
on_each_set = pytest.mark.parametrize("native", NATIVE)
FAST: list[Any] = [
    pytest.param(experts_by_group, torch.float32, id="by_group-float32"),
    pytest.param(experts_by_group, torch.bfloat16, id="by_group-bfloat16"),
    *(
        pytest.param(native_on(name), torch.bfloat16, id=f"native-{name}", marks=needs_kernel)
        for name in supported_sets()
    ),
]


def problem(num_tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Arguments of an `ExpertsFunction`; the last expert gets no token, so that an empty group is among them."""
    torch.manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, HIDDEN)
    ids = torch.rand(num_tokens, NUM_EXPERTS - 1).argsort(dim=1)[:, :TOP_K].contiguous()
    gate_up, down = torch.randn(NUM_EXPERTS, 2 * WIDTH, HIDDEN) / 8, torch.randn(NUM_EXPERTS, HIDDEN, WIDTH) / 8
    weights = torch.rand(num_tokens, TOP_K)
    return (hidden.to(dtype), ids, weights.to(dtype), gate_up.to(dtype), down.to(dtype))


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """float32: the order of sums. bfloat16: that, and the reference's rounding of each term it adds."""
    tolerance = 1e-5 if actual.dtype == torch.float32 else 2**-7
    scale = expected.float().abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 5, 70])
@pytest.mark.parametrize(("function", "dtype"), FAST)
def test_fast_is_the_reference(function: ExpertsFunction, dtype: torch.dtype, num_tokens: int) -> None:
    arguments = problem(num_tokens, dtype)
    assert_close(function(*arguments), experts_torch_reference(*arguments))


@pytest.mark.parametrize(("function", "dtype"), FAST)
def test_experts_of_other_ranks_add_nothing(function: ExpertsFunction, dtype: torch.dtype) -> None:
    """Ids on both sides of the local range."""
    hidden, ids, weights, gate_up, down = problem(20, dtype)
    arguments = (hidden, ids - 2, weights, gate_up[2:4], down[2:4])
    expected = experts_torch_reference(*arguments)
    assert expected.abs().max() > 0
    assert_close(function(*arguments), expected)
    assert torch.equal(function(hidden, ids + NUM_EXPERTS, weights, gate_up, down), torch.zeros_like(hidden))


@pytest.mark.parametrize(("function", "dtype"), [*FAST, (experts_torch_reference, torch.float32)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_token_that_is_not_finite_stays_alone(function: ExpertsFunction, dtype: torch.dtype, value: float) -> None:
    """It shares tiles and groups with others; so does padding, which is nobody's work and may hold anything."""
    hidden, ids, weights, gate_up, down = problem(21, dtype)
    ids[9] = -1
    expected = function(hidden, ids, weights, gate_up, down)
    hidden[[4, 9]], weights[[4, 9]] = value, float("nan")
    found = function(hidden, ids, weights, gate_up, down)
    others = [row for row in range(21) if row not in (4, 9)]
    assert found[4].isnan().all()
    assert torch.equal(found[others], expected[others])


@on_each_set
def test_native_rounds_to_bfloat16_where_torch_does(native: ExpertsFunction) -> None:
    """With sums of one term, and one expert per token, nothing may differ: every rounding is seen, no order of sums is."""
    hidden, _, _, gate_up, down = problem(200, torch.bfloat16)
    hidden[:, 1:] = 0
    down[..., 1:] = 0
    ids, weights = torch.randint(0, NUM_EXPERTS, (200, 1)), torch.rand(200, 1).bfloat16()
    actual = native(hidden, ids, weights, gate_up, down)
    assert torch.equal(actual, experts_torch_reference(hidden, ids, weights, gate_up, down))


@on_each_set
def test_native_result_of_a_token_has_the_same_bits_in_any_batch_and_with_any_threads(native: ExpertsFunction) -> None:
    hidden, ids, weights, gate_up, down = problem(37, torch.bfloat16)
    together = native(hidden, ids, weights, gate_up, down)
    for size in (1, 2, 3, 8):
        parts = [
            native(*(x.contiguous() for x in part), gate_up, down)
            for part in zip(hidden.split(size), ids.split(size), weights.split(size), strict=True)
        ]
        assert torch.equal(torch.cat(parts), together), size
    threads = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            assert torch.equal(native(hidden, ids, weights, gate_up, down), together), num_threads
    finally:
        torch.set_num_threads(threads)


@on_each_set
def test_native_activation_is_right_far_from_zero(native: ExpertsFunction) -> None:
    """silu of values whose exponential overflows or vanishes: no NaN, and the right limit."""
    hidden = torch.zeros(4, 32, dtype=torch.bfloat16)
    hidden[:, 0] = torch.tensor([-1000.0, -90.0, 90.0, 1000.0])
    gate_up, down = torch.zeros(1, 64, 32), torch.zeros(1, 32, 32)
    gate_up[0, 0, 0], gate_up[0, 32, 0], down[0, 0, 0] = 1.0, 0.125, 1.0
    arguments = (hidden, torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1, dtype=torch.bfloat16))
    weights = (gate_up.bfloat16(), down.bfloat16())
    actual = native(*arguments, *weights)
    torch.testing.assert_close(actual, experts_torch_reference(*arguments, *weights), rtol=2**-8, atol=1e-30)


@pytest.mark.parametrize(
    ("backend", "dtype", "width", "expected"),
    [
        ("torch_reference", torch.bfloat16, 64, "experts_torch_reference"),
        ("fast", torch.float32, 64, "experts_by_group"),
        ("fast", torch.bfloat16, 42, "experts_by_group"),
        pytest.param("fast", torch.bfloat16, 64, "experts_native", marks=needs_kernel),
    ],
)
def test_selection(backend: str, dtype: torch.dtype, width: int, expected: str) -> None:
    down = torch.empty(1, 64, width, dtype=dtype)
    assert select_experts_function(backend, down, 0, 1).__name__ == expected


@pytest.mark.parametrize("split", ["ep", "tp"])
@pytest.mark.parametrize("size", [1, 2])
def test_partial_results_of_both_splits_add_up(split: str, size: int) -> None:
    hidden, ids, weights, gate_up, down = problem(25, torch.float32)
    total = torch.zeros_like(hidden)
    for rank in range(size):
        axis = Axis("tp", rank, size, None, tuple(range(size)))
        experts = Experts(
            NUM_EXPERTS, HIDDEN, WIDTH, axis, split=split, backend="auto", weight_format=WeightFormat(hidden.dtype, CPU)
        )
        for expert_id in range(NUM_EXPERTS):
            gate, up = gate_up[expert_id].chunk(2)
            for part, weight in (("gate", gate), ("up", up), ("down", down[expert_id])):
                experts.sharded_weight(expert_id, part).load(weight)
        assert experts.down.data.numel() == down.numel() // size
        total += experts(hidden, ids, weights)
    assert_close(total, experts_torch_reference(hidden, ids, weights, gate_up, down))


@pytest.mark.parametrize(("split", "name"), [("ep", "num_experts=5"), ("tp", "moe_intermediate_size=33")])
def test_sizes_that_the_axis_does_not_divide_are_refused(split: str, name: str) -> None:
    axis = Axis("tp", 0, 2, None, (0, 1))
    with pytest.raises(ValueError, match=name):
        Experts(5, 32, 33, axis, split=split, backend="auto", weight_format=WeightFormat(torch.float32, CPU))


def test_a_wrong_shape_is_refused_also_for_an_expert_of_another_rank() -> None:
    axis = Axis("tp", 1, 2, None, (0, 1))
    experts = Experts(4, 32, 64, axis, split="ep", backend="auto", weight_format=WeightFormat(torch.float32, CPU))
    with pytest.raises(ValueError, match=r"shape \(64, 32\): must be \(32, 64\)"):
        experts.sharded_weight(0, "down").load(torch.zeros(64, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", [experts_torch_reference, experts_by_group])
def test_clamped_experts_are_those_of_transformers(dtype: torch.dtype, function: Any) -> None:
    """Some gates and ups are beyond the limit."""
    config = GptOssConfig(hidden_size=32, intermediate_size=48, num_local_experts=4, swiglu_limit=0.9)
    config._experts_implementation = "eager"
    theirs = GptOssExperts(config).to(dtype).requires_grad_(False)
    for parameter in theirs.parameters():
        parameter.normal_(std=1 / 4)
    hidden = torch.randn(9, 32).to(dtype)
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    weights = torch.softmax(torch.randn(9, 2), dim=-1).to(dtype)
    clamped = ClampedExperts(theirs.gate_up_proj_bias, theirs.down_proj_bias, SwigluClamp(config.swiglu_alpha, 0.9))
    gate_up, down = (x.transpose(1, 2).contiguous() for x in (theirs.gate_up_proj, theirs.down_proj))
    found = function(hidden, ids, weights, gate_up, down, clamped=clamped)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(found, theirs(hidden, ids, weights), **tolerance)


@pytest.mark.parametrize("backend", ["auto", "torch_reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_of_no_tokens_have_the_dtype_of_those_of_some(dtype: torch.dtype, backend: str) -> None:
    """Ranks exchange them, and one may have got no token."""
    hidden, ids, weights, _, _ = problem(3, dtype)
    axis = Axis("ep", 1, 2, None, (0, 1))
    experts = Experts(
        NUM_EXPERTS, HIDDEN, WIDTH, axis, split="ep", backend=backend, weight_format=WeightFormat(dtype, CPU)
    )
    some, none = experts(hidden, ids, weights), experts(hidden[:0], ids[:0], weights[:0])
    assert none.dtype == some.dtype and none.shape == (0, HIDDEN)
