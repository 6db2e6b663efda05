"""How many KV pages the memory gives, on devices that are not there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from waybill.engine.config import EngineConfig
from waybill.engine.kv_cache.kv_store import KVTensorSpec
from waybill.engine.runner import kv_cache_size
from waybill.engine.runner.kv_cache_size import available_bytes, kv_memory_fraction, kv_pool_pages
from waybill.parallel.mesh import Axis, ParallelMesh

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
NUM_LAYERS, CONTEXT = 2, 1000
# 8 bytes a token in each layer.
SPECS = [KVTensorSpec("k", (2,), torch.bfloat16), KVTensorSpec("v", (2,), torch.bfloat16)]
BYTES_PER_TOKEN = 16
FREE = 100_000


def make_config(**fields: Any) -> EngineConfig:
    return EngineConfig(model_path="x", **fields)


def mesh_on(device: torch.device, ranks_per_node: int = 1) -> ParallelMesh:
    node = Axis("node", 0, ranks_per_node, None, tuple(range(ranks_per_node)))
    return replace(ParallelMesh.single(device), node=node)


def pages(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, *, ranks_per_node: int = 1, free: int = FREE, **fields: Any
) -> int:
    """Of an engine that finds so many bytes free once its weights are there."""
    monkeypatch.setattr(kv_cache_size, "available_bytes", lambda _: free)
    # What ranks tell each other lies on the device.
    make = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda data, device=None: make(data))
    return kv_pool_pages(make_config(**fields), CONTEXT, SPECS, NUM_LAYERS, mesh_on(device, ranks_per_node))


def test_the_share_of_the_memory_is_the_devices_unless_configured() -> None:
    assert make_config().kv_memory_fraction is None
    assert (kv_memory_fraction(make_config(), CUDA), kv_memory_fraction(make_config(), CPU)) == (0.85, 0.25)
    for device in (CPU, CUDA):
        assert kv_memory_fraction(make_config(kv_memory_fraction=0.5), device) == 0.5


def test_a_gpu_gives_most_of_what_the_weights_have_left(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pages(monkeypatch, CUDA) == int(FREE * 0.85) // BYTES_PER_TOKEN
    assert pages(monkeypatch, CUDA, page_size=16) == int(FREE * 0.85) // (16 * BYTES_PER_TOKEN)
    assert pages(monkeypatch, CUDA, kv_memory_fraction=0.5) == FREE // 2 // BYTES_PER_TOKEN


def test_ranks_share_the_memory_of_a_host_and_not_that_of_their_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pages(monkeypatch, CPU) == FREE // 4 // BYTES_PER_TOKEN
    assert pages(monkeypatch, CPU, ranks_per_node=2) == FREE // 4 // 2 // BYTES_PER_TOKEN
    assert pages(monkeypatch, CUDA, ranks_per_node=2) == pages(monkeypatch, CUDA)


def test_no_more_is_taken_than_all_requests_at_full_length_need(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pages(monkeypatch, CUDA, free=1 << 30, max_running_requests=3) == 3 * CONTEXT


def test_a_number_of_tokens_needs_no_look_at_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pages(monkeypatch, CUDA, free=0, kv_cache_tokens=33, page_size=16) == 3


@pytest.mark.parametrize(("device", "fraction"), [(CUDA, 0.85), (CPU, 0.25)])
def test_too_little_memory_is_refused_with_the_fraction_in_use(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, fraction: float
) -> None:
    with pytest.raises(ValueError, match=f"kv_memory_fraction={fraction}: .* bytes do not hold one KV page"):
        pages(monkeypatch, device, free=16)


def test_what_torchs_allocator_keeps_of_a_gpu_is_given_back_before_it_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: calls.append(f"look at {device}") or (7, 80))
    assert available_bytes(CUDA) == 7
    assert calls == ["empty", "look at cuda:0"]
