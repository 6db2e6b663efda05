"""The ring between two processes, and what must never pass for routes."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from waybill.engine.routing.capturer import RoutedExpertsCapturer
from waybill.engine.routing.geometry import RouteGeometry
from waybill.engine.routing.late_gather import LateRouteGather
from waybill.engine.routing.ring import RouteRing
from waybill.parallel.mesh import Axis

GEOMETRY = RouteGeometry(layer_ids=(1, 2), num_layers_total=3, max_tokens=4, top_k=2, num_experts=16)

READER = """
import sys
from waybill.engine.routing.geometry import RouteGeometry
from waybill.engine.routing.ring import RouteRing
ring = RouteRing.attach(sys.argv[1], RouteGeometry((1, 2), 3, 4, 2, 16), 2)
print(ring.rows(0, 0, 3).tolist())
ring.mark_filed(0)
"""


def test_another_process_reads_what_was_written_and_gives_the_slot_back() -> None:
    ring = RouteRing.create(GEOMETRY, 2)
    seq = ring.acquire(1.0)
    ring.slot(seq, 3)[:] = np.arange(12).reshape(2, 3, 2)
    done = subprocess.run([sys.executable, "-c", READER, ring.path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(np.arange(12).reshape(2, 3, 2).tolist())
    assert ring.num_filed == 1


def test_no_name_is_left_in_the_file_system() -> None:
    before = set(os.listdir("/dev/shm"))
    ring = RouteRing.create(GEOMETRY, 2)
    assert set(os.listdir("/dev/shm")) == before
    assert RouteRing.attach(ring.path, GEOMETRY, 2).num_filed == 0


def test_a_full_ring_waits_counts_and_never_drops() -> None:
    ring = RouteRing.create(GEOMETRY, 2)
    assert [ring.acquire(1.0), ring.acquire(1.0)] == [0, 1]
    with pytest.raises(TimeoutError, match="step 0 was not filed"):
        ring.acquire(0.01)
    ring.mark_filed(0)
    assert ring.acquire(0.01) == 2
    with pytest.raises(AssertionError, match="out of order"):
        ring.mark_filed(2)


@pytest.mark.parametrize(("num_experts", "dtype"), [(256, "uint8"), (257, "<u2")])
def test_the_narrowest_type_holds_every_id(num_experts: int, dtype: str) -> None:
    geometry = RouteGeometry((0,), 1, 4, 2, num_experts)
    assert geometry.dtype == np.dtype(dtype)
    assert int(np.array(num_experts - 1).astype(geometry.dtype)) == num_experts - 1


def test_ids_of_every_layer_reach_the_slot() -> None:
    ring = RouteRing.create(GEOMETRY, 2)
    capturer = RoutedExpertsCapturer(ring, torch.device("cpu"))
    seq = capturer.begin(3)
    ids = torch.arange(12).view(2, 3, 2)
    for layer in (1, 0):
        capturer.slot(layer).ids.copy_(ids[layer])
    capturer.finish()
    capturer.publish(seq)
    assert ring.rows(seq, 0, 3).tolist() == ids.tolist()


@pytest.mark.parametrize("recorded", [[0], [], [0, 0, 1]])
def test_a_layer_that_bypasses_the_recorder_fails_the_step(recorded: list[int]) -> None:
    """Zeros are valid expert ids: a layer that recorded nothing must never pass for one that chose expert 0."""
    capturer = RoutedExpertsCapturer(RouteRing.create(GEOMETRY, 2), torch.device("cpu"))
    capturer.begin(1)
    for layer in recorded:
        capturer.slot(layer).ids.zero_()
    with pytest.raises(RuntimeError, match="recorded nothing, or some twice"):
        capturer.finish()


def test_ids_gathered_late_reach_the_slot() -> None:
    ring = RouteRing.create(GEOMETRY, 2)
    cpu = torch.device("cpu")
    recorder = LateRouteGather(Axis.single(), GEOMETRY, 4, RoutedExpertsCapturer(ring, cpu), cpu)
    ids = torch.arange(12).view(2, 3, 2)
    for _ in range(2):
        seq = recorder.begin(3)
        for layer in (1, 0):
            recorder.slot(layer).ids.copy_(ids[layer])
        recorder.finish()
        recorder.publish(seq)
        assert ring.rows(seq, 0, 3).tolist() == ids.tolist()
        ids = ids.flip(0)


@pytest.mark.parametrize("recorded", [[0], [], [0, 0, 1]])
@pytest.mark.parametrize("records", [True, False])
def test_a_layer_that_bypasses_the_late_gather_fails_the_step(recorded: list[int], records: bool) -> None:
    """On every rank: what a layer left there a step ago must not pass for this step's routes."""
    cpu = torch.device("cpu")
    capturer = RoutedExpertsCapturer(RouteRing.create(GEOMETRY, 2), cpu) if records else None
    recorder = LateRouteGather(Axis.single(), GEOMETRY, 4, capturer, cpu)
    recorder.begin(1)
    for layer in (0, 1):
        recorder.slot(layer).ids.zero_()
    recorder.finish()
    recorder.begin(1)
    for layer in recorded:
        recorder.slot(layer).ids.zero_()
    with pytest.raises(RuntimeError, match="recorded nothing, or some twice"):
        recorder.finish()
