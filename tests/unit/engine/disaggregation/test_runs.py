"""Runs of slots, and the copies of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from waybill.engine.disaggregation.pool_writer import HostWriter
from waybill.engine.disaggregation.run_copy import copy_runs_cuda, copy_runs_torch, is_whole
from waybill.engine.disaggregation.slot_runs import slot_runs
from waybill.engine.kv_cache.kv_store import KVStore, KVTensorSpec

NUM_SLOTS = 12


@st.composite
def pairs(draw: Any) -> tuple[np.ndarray, np.ndarray]:
    """Slots there and here, in stretches that rise, fall, or stay apart."""
    cuts = sorted(draw(st.sets(st.integers(1, NUM_SLOTS - 1))))
    sides = []
    turned = [draw(st.booleans()) for _ in range(len(cuts) + 1)]
    for _ in range(2):
        parts = np.split(np.arange(NUM_SLOTS), cuts)
        parts = [part[::-1] if falls else part for part, falls in zip(parts, turned, strict=True)]
        order = draw(st.permutations(range(len(parts))))
        sides.append(np.concatenate([parts[index] for index in order]))
    size = draw(st.integers(0, NUM_SLOTS))
    return sides[0][:size].astype(np.int64), sides[1][:size].astype(np.int64)


@given(pairs())
def test_runs_have_each_pair_once_and_are_as_long_as_they_can_be(slots: tuple[np.ndarray, np.ndarray]) -> None:
    there, here = slots
    runs = slot_runs(there, here)
    found = [(first + i, own + i) for first, own, num_slots in runs for i in range(num_slots)]
    assert sorted(found) == sorted(zip(there.tolist(), here.tolist(), strict=True))
    steps = list(zip(np.diff(there).tolist(), np.diff(here).tolist(), strict=True))
    assert len(runs) == sum(step not in ((1, 1), (-1, -1)) for step in steps) + bool(len(there))


def test_a_prompt_on_fresh_pages_of_one_slot_is_one_run() -> None:
    there, here = np.arange(900, 100, -1), np.arange(800, 0, -1)
    assert slot_runs(there, here) == [(101, 1, 800)]


@given(pairs(), st.booleans())
def test_runs_and_rows_are_the_same_copy(slots: tuple[np.ndarray, np.ndarray], are_runs: bool) -> None:
    there, here = slots
    specs = [KVTensorSpec("k", (4, 3), torch.float32), KVTensorSpec("latent", (5,), torch.float32)]
    source, target = (KVStore(2, NUM_SLOTS, 1, specs, torch.device("cpu")) for _ in range(2))
    for index, tensor in enumerate(source.tensors()):
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) + 1000 * index)
    writer = HostWriter(target)
    sources = writer.sources(source.stacks, source.memory.numpy())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("waybill.engine.disaggregation.pool_writer.HOST_RUN", 0 if are_runs else NUM_SLOTS + 1)
        num_bytes = writer.write(sources, there, here, (0, 2), (2, 4))
    assert num_bytes == len(there) * 2 * 4 * (2 * 3 + 5)
    for found, tensor in zip(target.tensors(), source.tensors(), strict=True):
        expected = torch.zeros_like(found)
        if found.dim() == 3:
            expected[here, 2:4] = tensor[there, 0:2]
        else:
            expected[here] = tensor[there]
        assert torch.equal(found, expected)


def test_a_part_of_the_heads_is_no_run() -> None:
    keys, latents = torch.zeros(2, 5, 4, 6), torch.zeros(2, 5, 6)
    assert is_whole(keys, None) and is_whole(keys, (0, 4)) and is_whole(latents, (1, 2))
    assert not is_whole(keys, (0, 3)) and not is_whole(keys, (1, 4))
    # The driver counts a layer's bytes in 31 bits.
    assert not is_whole(torch.empty(2, 2**20, 2**10, device="meta"), None)


@pytest.mark.gpu
def test_the_device_copies_runs_as_torch_does() -> None:
    source = torch.randn(3, 10, 2, 4, device="cuda")
    results = [torch.zeros(3, 12, 2, 4, device="cuda") for _ in range(2)]
    for copy_runs, target in zip((copy_runs_torch, copy_runs_cuda), results, strict=True):
        copy_runs(source, target, [(2, 5, 3), (0, 1, 2), (9, 0, 1)], torch.cuda.current_stream().cuda_stream)
    assert torch.equal(*results) and results[0].any()
