"""What a step must at least read, against the tensors of the checkpoint."""

from __future__ import annotations

import math

import pytest
from gpu_limits import cached_width, layer_bytes, num_experts, prefill_flops
from model_shapes import SHAPES, make_config, tensor_shapes


@pytest.mark.parametrize("shape", ["30b", "moonlight", "kimik2"])
def test_all_experts_are_all_weights_of_the_layers(shape: str) -> None:
    matrices = [
        math.prod(size) for name, size in tensor_shapes(make_config(shape)) if len(size) == 2 and ".layers." in name
    ]
    assert layer_bytes(SHAPES[shape], num_experts(SHAPES[shape])) == 2 * sum(matrices)


def test_what_is_kept_of_a_token() -> None:
    assert (cached_width(SHAPES["30b"]), cached_width(SHAPES["moonlight"])) == (1024, 576)


@pytest.mark.parametrize(("shape", "active"), [("30b", 2.7e9), ("moonlight", 2.2e9)])
def test_a_short_prefill_does_what_its_active_weights_ask_for(shape: str, active: float) -> None:
    """Without the embedding and the head."""
    assert prefill_flops(SHAPES[shape], 1) / 2 == pytest.approx(active, rel=0.06)
