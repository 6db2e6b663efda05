"""Random weights depend on names alone: whatever the layout, a rank has its part of the same tensors."""

from __future__ import annotations

import torch

from waybill.engine.models.dummy_weights import RandomSource, fill_with_random_values
from waybill.parallel.weights import ShardedWeight

CPU = torch.device("cpu")


def filled(dtype: torch.dtype, *, first: int = 0, last: int = 64) -> torch.Tensor:
    """Rows of a matrix of 64 x 48."""
    storage = torch.full((last - first, 48), torch.nan, dtype=dtype)
    fill_with_random_values({"a.weight": ShardedWeight.of((64, 48), storage, first=first)}, dtype, CPU)
    return storage


def test_a_slice_is_that_of_the_whole_tensor() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        whole = filled(dtype)
        assert torch.equal(torch.cat([filled(dtype, last=10), filled(dtype, first=10)]), whole)
        assert torch.equal(whole, filled(dtype))


def test_activations_keep_their_variance() -> None:
    assert 0.9 < filled(torch.float32).std().item() * 48**0.5 < 1.1
    assert torch.equal(RandomSource("norm.weight", (5,), torch.float32, CPU)[:], torch.ones(5))
    assert torch.equal(RandomSource("q_proj.bias", (5,), torch.float32, CPU)[1:3], torch.zeros(2))


def test_tensors_differ() -> None:
    a, b = (RandomSource(name, (4, 4), torch.float32, CPU)[:] for name in ("a.weight", "b.weight"))
    assert not torch.equal(a, b)
