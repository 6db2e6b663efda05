"""Block FP8: what it rounds, products by it, and slices that cut its blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from waybill.parallel.fp8 import (
    BLOCK,
    E4M3,
    MAX_E4M3,
    Grid,
    QuantisedWeight,
    dequantise,
    quantise_blocks,
    quantise_tokens,
    scale_names,
    through_e4m3,
    with_scales,
)
from waybill.parallel.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from waybill.parallel.mesh import Axis
from waybill.parallel.moe.experts import Experts, experts_by_group, experts_torch_reference
from waybill.parallel.weight_format import Fp8Format, WeightFormat
from waybill.parallel.weights import ShardedWeight

EXACT = Fp8Format(torch.float32, torch.device("cpu"))
QUANTISED = Fp8Format(torch.float32, torch.device("cpu"), quantises_activations=True)
# Of three bits behind the point: half of the last one. Below the smallest normal number, 2^-6, steps are 2^-9.
RELATIVE, SMALLEST_STEP = 2.0**-4, 2.0**-9


def axis(rank: int, size: int) -> Axis:
    return Axis("tp", rank, size, None, tuple(range(size)))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def load(weight: ShardedWeight, tensor: torch.Tensor, how: str) -> None:
    """As floating point, or as e4m3 with its scales."""
    assert isinstance(weight, QuantisedWeight)
    if how == "float":
        weight.load(tensor)
        return
    data, scales = quantise_blocks(tensor)
    weight.load(data)
    assert weight.scale is not None
    weight.scale.load(scales)


def numbers_of(layer: Any) -> torch.Tensor:
    """What a layer's matrix stands for."""
    return dequantise(layer.matrix.data, layer.matrix.scales, layer.matrix.grid)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([1e-6, 1.0, 1e4]))
def test_every_number_is_rounded_as_e4m3_rounds(rows: int, columns: int, size: float) -> None:
    values = normal(rows, columns) * size
    data, scales = quantise_blocks(values)
    assert data.dtype == E4M3 and scales.shape == (-(-rows // BLOCK), -(-columns // BLOCK))
    each = Grid().spread(scales, rows, columns)
    bound = torch.maximum(values.abs() * RELATIVE, each * SMALLEST_STEP / 2)
    assert ((dequantise(data, scales) - values).abs() <= bound * (1 + 1e-6)).all()
    # The largest number of a block uses all of the range.
    assert data.float().abs().max() == MAX_E4M3


def test_a_block_of_zeros_and_one_of_nan() -> None:
    values = torch.zeros(BLOCK, 3 * BLOCK)
    values[5, 2 * BLOCK] = float("nan")
    restored = dequantise(*quantise_blocks(values))
    assert (restored[:, : 2 * BLOCK] == 0).all() and restored[5, 2 * BLOCK].isnan()
    assert (quantise_tokens(torch.zeros(2, 256))[0].float() == 0).all()


@pytest.mark.parametrize("how", ["float", "fp8"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_together_hold_the_quantised_matrix(size: int, how: str) -> None:
    """Slices that end inside of blocks, in rows and in columns; parts side by side whose sizes are no multiples."""
    up, gate, row = normal(96 * 4, 160, seed=1), normal(40 * 4, 160, seed=2), normal(150, 72 * 4, seed=3)
    found: dict[str, list[torch.Tensor]] = {"up": [], "gate": [], "row": []}
    for rank in range(size):
        merged = MergedColumnParallelLinear(160, [384, 160], axis(rank, size), weight_format=EXACT)
        load(merged.sharded_weight(0), up, how)
        load(merged.sharded_weight(1), gate, how)
        parts = numbers_of(merged).split([384 // size, 160 // size])
        rows = RowParallelLinear(288, 150, axis(rank, size), weight_format=EXACT)
        load(rows.sharded_weight(), row, how)
        for name, part in zip(found, (*parts, numbers_of(rows)), strict=True):
            found[name].append(part)
    for name, whole in (("up", up), ("gate", gate), ("row", row)):
        assert torch.equal(torch.cat(found[name], dim=int(name == "row")), dequantise(*quantise_blocks(whole))), name


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2), (3, 4)])
def test_heads_that_ranks_share(rank: int, size: int) -> None:
    """Two kv heads on four ranks, 48 columns each."""
    layer = QKVParallelLinear(100, 48, 8, 2, axis(rank, size), weight_format=EXACT)
    whole = {part: normal(48 * heads, 100, seed=ord(part)) for part, heads in zip("qkv", (8, 2, 2), strict=True)}
    for part, tensor in whole.items():
        load(layer.sharded_weight(part), tensor, "fp8")
    rounded = {part: dequantise(*quantise_blocks(tensor)) for part, tensor in whole.items()}
    heads, kv_rank = 8 // size, rank * 2 // size
    kv = slice(kv_rank * 48, (kv_rank + max(1, 2 // size)) * 48)
    expected = torch.cat([rounded["q"][rank * heads * 48 :][: heads * 48], rounded["k"][kv], rounded["v"][kv]])
    assert torch.equal(numbers_of(layer), expected)


@pytest.mark.parametrize("split", ["ep", "tp"])
@pytest.mark.parametrize("size", [1, 2])
def test_experts(split: str, size: int) -> None:
    """Partial results of the ranks add up to those of the dequantised matrices; as one tensor, or one an expert."""
    num_experts, hidden, width = 4, 100, 96
    gate_up, down = normal(num_experts, 2 * width, hidden, seed=1) / 10, normal(num_experts, hidden, width, seed=2) / 10
    halves = [dequantise(*quantise_blocks(half)) for half in gate_up.split(width, dim=1)]
    rounded = torch.cat(halves, dim=1), dequantise(*quantise_blocks(down))
    x, ids = normal(9, hidden, seed=3), torch.arange(18).view(9, 2) % num_experts
    weights = torch.rand(9, 2, generator=torch.Generator().manual_seed(4))
    total, fused_total = torch.zeros_like(x), torch.zeros_like(x)
    for rank in range(size):
        each, fused = (
            Experts(num_experts, hidden, width, axis(rank, size), split=split, backend="fast", weight_format=EXACT)
            for _ in range(2)
        )
        for expert in range(num_experts):
            for part, tensor in zip(("gate", "up", "down"), (*gate_up[expert].split(width), down[expert]), strict=True):
                weight = each.sharded_weight(expert, part)
                if weight.pieces:
                    load(weight, tensor, "fp8")
        fused.fused_weight("gate_up").load(gate_up)
        fused.fused_weight("down").load(down)
        total += each(x, ids, weights)
        fused_total += fused(x, ids, weights)
    assert torch.equal(total, fused_total)
    torch.testing.assert_close(total, experts_torch_reference(x, ids, weights, *rounded), rtol=1e-5, atol=1e-5)


def test_products_are_those_of_the_dequantised_matrix_and_activations() -> None:
    x, tensor, bias = normal(5, 300, seed=1), normal(700, 300, seed=2), normal(700, seed=3)
    for weight_format, seen in ((EXACT, x), (QUANTISED, through_e4m3(x))):
        layer = QKVParallelLinear(300, 100, 5, 1, Axis.single(), bias=True, weight_format=weight_format)
        parts = zip(("q", "k", "v"), tensor.split([500, 100, 100]), bias.split([500, 100, 100]), strict=True)
        for part, rows, values in parts:
            layer.sharded_weight(part).load(rows)
            layer.sharded_bias(part).load(values)
        by_part = torch.cat([dequantise(*quantise_blocks(rows)) for rows in tensor.split([500, 100, 100])])
        torch.testing.assert_close(layer(x), F.linear(seen, by_part, bias), rtol=1e-4, atol=1e-4)
    assert not torch.equal(through_e4m3(x), x)
    experts = Experts(2, 300, 64, Axis.single(), split="ep", backend="fast", weight_format=QUANTISED)
    experts.fused_weight("gate_up").load(normal(2, 128, 300))
    experts.fused_weight("down").load(normal(2, 300, 64))
    problem = (
        x,
        torch.tensor([[0], [1], [1], [0], [1]]),
        torch.ones(5, 1),
        experts.gate_up.stored,
        experts.down.stored,
    )
    torch.testing.assert_close(experts_by_group(*problem), experts_torch_reference(*problem))


def test_slices_that_are_too_narrow_for_a_gpu_are_refused() -> None:
    """Before anything is made on it."""
    elsewhere = Fp8Format(torch.float32, torch.device("meta"))
    with pytest.raises(ValueError, match="end 16 into a block of 128; must be a multiple of 32 on CUDA"):
        elsewhere.matrix(64, 48, column_cuts=(48,))
    assert EXACT.matrix(64, 48, column_cuts=(48,)).shape == (64, 48)


def test_numbers_of_eight_bits_are_taken_with_their_scales_alone() -> None:
    layer = RowParallelLinear(256, 128, Axis.single(), weight_format=EXACT)
    plain = RowParallelLinear(256, 128, Axis.single(), weight_format=WeightFormat(torch.float32, EXACT.device))
    layer.sharded_weight().check_dtype(E4M3)
    with pytest.raises(ValueError, match="dtype float8_e4m3fn: must be one of bfloat16"):
        plain.sharded_weight().check_dtype(E4M3)
    with pytest.raises(ValueError, match="dtype float8_e5m2"):
        layer.sharded_weight().check_dtype(torch.float8_e5m2)
    weights = with_scales({"a.weight": layer.sharded_weight(), "b.weight": plain.sharded_weight()})
    assert scale_names(weights) == {"a.weight": "a.weight_scale_inv"} and len(weights) == 3
    assert weights["a.weight_scale_inv"].shape == (1, 2)
    stack = Experts(2, 64, 64, Axis.single(), split="ep", backend="fast", weight_format=EXACT).fused_weight("down")
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        stack.check_dtype(E4M3)
