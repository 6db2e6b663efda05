"""How often experts are chosen: counted right, bounded, and only while somebody asks."""

from __future__ import annotations

import numpy as np

from waybill.engine.output.expert_load import (
    MAX_SAMPLE_ROWS,
    MAX_SAMPLES,
    SAMPLE_PERIOD_S,
    WATCH_S,
    ExpertLoad,
    count_ids,
)
from waybill.engine.routing.geometry import RouteGeometry

NUM_LAYERS, TOP_K, NUM_EXPERTS = 3, 2, 16
GEOMETRY = RouteGeometry(layer_ids=(1, 2, 5), num_layers_total=6, max_tokens=1024, top_k=TOP_K, num_experts=NUM_EXPERTS)


def rows_of(num_rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, NUM_EXPERTS, (NUM_LAYERS, num_rows, TOP_K)).astype(np.uint8)


def slow_counts(rows: np.ndarray) -> np.ndarray:
    counts = np.zeros((NUM_LAYERS, NUM_EXPERTS), dtype=np.int64)
    for layer, row, choice in np.ndindex(*rows.shape):
        counts[layer, rows[layer, row, choice]] += 1
    return counts


class Watched:
    """A count with a clock of its own."""

    def __init__(self, num_dp_ranks: int = 1) -> None:
        self.now = 100.0
        self.load = ExpertLoad(num_dp_ranks, lambda: self.now)
        self.load.geometry = GEOMETRY

    def take(self) -> tuple[int, np.ndarray]:
        reply = self.load.take("op")
        assert reply.op_id == "op" and reply.layer_ids == (1, 2, 5) and reply.num_experts == NUM_EXPERTS
        return reply.num_rows, np.frombuffer(reply.counts, dtype="<u4").reshape(NUM_LAYERS, NUM_EXPERTS)


def test_ids_are_counted_by_layer_and_expert() -> None:
    wide = rows_of(50).astype(np.uint16)
    assert np.array_equal(count_ids(rows_of(50), NUM_EXPERTS), slow_counts(rows_of(50)))
    assert np.array_equal(count_ids(wide, NUM_EXPERTS), slow_counts(wide))


def test_nothing_is_kept_while_nobody_asks() -> None:
    watched = Watched()
    watched.load.offer(0, rows_of(4))
    assert watched.take()[0] == 0
    watched.load.offer(0, rows_of(4))
    assert watched.take()[0] == 4 and watched.take()[0] == 0
    # Nobody asks any more; what was sampled before that is not of the next watch.
    watched.now += SAMPLE_PERIOD_S
    watched.load.offer(0, rows_of(4))
    watched.now += WATCH_S
    watched.load.offer(0, rows_of(4))
    assert watched.take()[0] == 0


def test_a_step_now_and_then_is_enough() -> None:
    watched = Watched()
    watched.take()
    for step in range(10):
        watched.load.offer(0, rows_of(4, step))
        watched.now += SAMPLE_PERIOD_S / 4
    num_rows, counts = watched.take()
    assert num_rows == 3 * 4
    assert np.array_equal(counts, sum(slow_counts(rows_of(4, step)) for step in (0, 4, 8)))


def test_every_dp_rank_has_its_turn() -> None:
    watched = Watched(num_dp_ranks=2)
    watched.take()
    for step in range(4):
        for dp_rank in range(2):
            watched.load.offer(dp_rank, rows_of(2 + dp_rank, step))
        watched.now += SAMPLE_PERIOD_S
    assert watched.take()[0] == 2 * (2 + 3)


def test_the_work_is_bounded() -> None:
    watched = Watched()
    watched.take()
    for step in range(2 * MAX_SAMPLES):
        # Somebody asks elsewhere, and this thread is never drained.
        watched.load._watched_until = watched.now + WATCH_S
        watched.load.offer(0, rows_of(1000, step))
        watched.now += SAMPLE_PERIOD_S
    assert watched.take()[0] == 250 * MAX_SAMPLES and MAX_SAMPLE_ROWS >= 250


def test_rows_are_copied_before_their_slot_is_given_back() -> None:
    watched = Watched()
    watched.take()
    rows = rows_of(8)
    expected = slow_counts(rows)
    watched.load.offer(0, rows)
    rows[:] = 0
    assert np.array_equal(watched.take()[1], expected)


def test_without_routing_there_are_no_layers() -> None:
    reply = ExpertLoad().take("op")
    assert reply.layer_ids == () and reply.counts == b""
