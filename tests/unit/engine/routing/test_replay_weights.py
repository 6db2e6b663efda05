"""Replay of recorded combine weights: the experts get them to the bit, and no gradient reaches the routers through them."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from support.replay_models import (
    CONFIGS,
    NUM_EXPERTS,
    decoder_layers,
    gradients,
    layer_ids,
    make_model,
    make_routes,
    moe_layers,
    random_rows,
    random_tokens,
)

from waybill.engine.routing.geometry import RouteGeometry
from waybill.engine.routing.replay import RoutedExpertsBatch, replay_routing, routes_from_answer
from waybill.engine.routing.wire import RoutedExperts, encode_weights, raw_bytes, weight_bits

LENGTH = 6
MASK = torch.ones(1, LENGTH)


@contextmanager
def seen_by_experts(model: Any) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Ids and weights [T, K] that the experts of each MoE layer are called with."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handles = [
        layer.mlp.experts.register_forward_pre_hook(lambda _, args: seen.append((args[1].clone(), args[2].clone())))
        for layer in moe_layers(model)
    ]
    yield seen
    for handle in handles:
        handle.remove()


def with_weights(model: Any, rows: np.ndarray, values: np.ndarray, dtype: str = "float32") -> RoutedExperts:
    """Rows [R, M, K] and weights of the same shape, which `dtype` must have."""
    routed = make_routes(model, rows)
    layers = layer_ids(model)
    geometry = RouteGeometry(layers, len(decoder_layers(model)), 1, rows.shape[2], NUM_EXPERTS, dtype)
    bits = weight_bits(values.astype(np.float32), dtype)
    return replace(routed, weights=encode_weights(bits, 0, geometry, routed.meta.weight_versions))


def random_weights(rows: np.ndarray, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(rows.shape, dtype=np.float32)


@pytest.mark.parametrize("family", CONFIGS)
def test_experts_get_the_recorded_weights_and_routers_no_gradient(family: str) -> None:
    model, tokens = make_model(family), random_tokens(1, LENGTH)
    rows = random_rows(model, LENGTH)
    values = random_weights(rows)
    batch = RoutedExpertsBatch.from_padded([with_weights(model, rows, values)], MASK, replay_weights=True)
    with replay_routing(model), seen_by_experts(model) as seen:
        logits = model(tokens, routed_experts=batch).logits
        logits.sum().backward()
    assert len(seen) == rows.shape[1]
    for column, (ids, weights) in enumerate(seen):
        assert np.array_equal(ids.numpy(), rows[:, column])
        assert weights.dtype == torch.float32 and np.array_equal(weights.detach().numpy(), values[:, column])
    found = gradients(model)
    for layer in layer_ids(model):
        ending = f"layers.{layer}.mlp.{'router' if family == 'gpt_oss' else 'gate'}.weight"
        router = next(name for name, _ in model.named_parameters() if name.endswith(ending))
        assert not found[router].any()
        experts = [grad for name, grad in found.items() if f"layers.{layer}.mlp.experts." in name]
        assert experts and all(grad.any() for grad in experts)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_forward_replayed_with_its_own_ids_and_weights_is_the_same_to_the_bit(family: str) -> None:
    model, tokens = make_model(family), random_tokens(1, LENGTH)
    with torch.no_grad(), seen_by_experts(model) as seen:
        native = model(tokens).logits
    rows = torch.stack([ids for ids, _ in seen], dim=1).numpy().astype(np.uint8)
    values = torch.stack([weights for _, weights in seen], dim=1).numpy()
    batch = RoutedExpertsBatch.from_padded([with_weights(model, rows, values)], MASK, replay_weights=True)
    # Another router: its weights would be others.
    for layer in moe_layers(model):
        (layer.mlp.router if family == "gpt_oss" else layer.mlp.gate).weight.data.mul_(3)
    with torch.no_grad(), replay_routing(model):
        assert torch.equal(model(tokens, routed_experts=batch).logits, native)


def test_a_position_without_a_row_has_its_routers_weights() -> None:
    model, tokens = make_model("qwen3_moe"), random_tokens(1, LENGTH)
    with torch.no_grad(), seen_by_experts(model) as native:
        model(tokens)
    rows = torch.stack([ids for ids, _ in native], dim=1).numpy().astype(np.uint8)[:-1]
    values = random_weights(rows)
    batch = RoutedExpertsBatch.from_padded([with_weights(model, rows, values)], MASK, replay_weights=True)
    with torch.no_grad(), replay_routing(model), seen_by_experts(model) as seen:
        model(tokens, routed_experts=batch)
    # Of the first layer, whose input is the same.
    assert torch.equal(seen[0][1][-1], native[0][1][-1])
    assert np.array_equal(seen[0][1][:-1].numpy(), values[:, 0])


def test_recorded_weights_are_replayed_only_where_they_are_asked_for_and_there() -> None:
    model = make_model("qwen3_moe")
    rows = random_rows(model, LENGTH)
    plain, weighted = make_routes(model, rows), with_weights(model, rows, random_weights(rows))
    assert RoutedExpertsBatch.from_padded([weighted], MASK).weights is None
    with pytest.raises(ValueError, match=r"routes\[0\]: has no combine weights to replay"):
        RoutedExpertsBatch.from_padded([plain], MASK, replay_weights=True)
    others = with_weights(model, rows, random_weights(rows, seed=1))
    with pytest.raises(ValueError, match=r"routes\[0\]: parts disagree where they overlap"):
        RoutedExpertsBatch.from_padded([[weighted, others]], MASK, replay_weights=True)
    cu_seqlens = torch.tensor([0, LENGTH])
    packed = RoutedExpertsBatch.from_packed([weighted], cu_seqlens=cu_seqlens, replay_weights=True).to("cpu")
    assert weighted.weights is not None and packed.weights is not None
    assert np.array_equal(packed.weights.numpy(), weighted.weights.as_float32())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["array", "base64"])
def test_weights_of_answers(dtype: str, form: str) -> None:
    model = make_model("qwen3_moe")
    rows = random_rows(model, LENGTH)
    values = torch.from_numpy(random_weights(rows)).to(getattr(torch, dtype)).float().numpy()
    routed = with_weights(model, rows, values, dtype)
    assert routed.weights is not None
    encoded = base64.b64encode(raw_bytes(routed.weights.rows)).decode()
    meta_info = {
        "routed_experts": routed.rows,
        "routed_experts_meta": msgspec.to_builtins(routed.meta),
        "router_weights": values if form == "array" else encoded,
        "router_weights_meta": msgspec.to_builtins(routed.weights.meta),
    }
    found = routes_from_answer(meta_info)
    assert found is not None and found.weights is not None
    assert np.array_equal(found.weights.as_float32(), values)
    spoilt = {**meta_info, "router_weights_meta": {**meta_info["router_weights_meta"], "checksum": "crc32:0"}}
    with pytest.raises(ValueError, match="router weights: checksum"):
        routes_from_answer(spoilt)
