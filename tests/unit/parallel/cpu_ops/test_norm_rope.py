"""Head norms, rotary positions and stores in C++ against those in torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from waybill.engine.models.norm_rope import HeadNorms, KVTarget, NativeLayerOps, TorchLayerOps
from waybill.parallel.cpu_ops.attention import has_native_attention

pytestmark = pytest.mark.skipif(not has_native_attention(), reason="needs AVX2 and a C++ compiler")
NUM_SLOTS = 50


def run(
    ops: TorchLayerOps, qkv: torch.Tensor, norms: HeadNorms | None, turned: int, num_kv_heads: int, width: int
) -> list[torch.Tensor]:
    """Queries, and what the caches hold."""
    generator = torch.Generator().manual_seed(len(qkv))
    angles = torch.rand(len(qkv), 1, turned, generator=generator) * 6
    caches = [torch.zeros(NUM_SLOTS, num_kv_heads, width).bfloat16() for _ in range(2)]
    slots = torch.randperm(NUM_SLOTS, generator=generator)[: len(qkv)]
    rope = (angles.cos().bfloat16(), angles.sin().bfloat16())
    return [ops.norm_rope_store(qkv, norms, rope, KVTarget(slots, *caches)), *caches]


@settings(max_examples=60, deadline=None)
@given(
    num_tokens=st.integers(1, 40),
    num_heads=st.integers(1, 6),
    num_kv_heads=st.integers(1, 3),
    width=st.sampled_from([2, 8, 40, 64, 72, 128]),
    turns_all=st.booleans(),
    with_norms=st.booleans(),
    seed=st.integers(0, 99),
)
def test_where_sums_are_exact_every_bit_is_that_of_torch(
    num_tokens: int, num_heads: int, num_kv_heads: int, width: int, turns_all: bool, with_norms: bool, seed: int
) -> None:
    """Whole numbers, whose squares add up exactly in any order; rows are further apart than they are long."""
    generator = torch.Generator().manual_seed(seed)
    total = (num_heads + 2 * num_kv_heads) * width
    qkv = torch.randint(-16, 17, (num_tokens, total + 5), generator=generator).bfloat16()[:, :total]
    norms = HeadNorms(*(torch.randn(2, width, generator=generator).bfloat16()), 1e-6) if with_norms else None
    turned = width if turns_all else width // 4 * 2 or 2
    found, expected = (run(ops, qkv, norms, turned, num_kv_heads, width) for ops in (NativeLayerOps(), TorchLayerOps()))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_with_its_head(value: float) -> None:
    qkv = torch.randn(6, 5 * 64).bfloat16()
    norms = HeadNorms(torch.ones(64).bfloat16(), torch.ones(64).bfloat16(), 1e-6)
    expected = run(NativeLayerOps(), qkv, norms, 64, 1, 64)[0]
    qkv[2, 70] = value
    found = run(NativeLayerOps(), qkv, norms, 64, 1, 64)[0]
    assert not found[2, 1].isfinite().all()
    found[2, 1] = expected[2, 1]
    assert torch.equal(found, expected)
