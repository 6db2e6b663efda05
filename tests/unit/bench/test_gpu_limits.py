"""What a layout's rank must read, beside what the whole model must; and how long a device is busy."""

from __future__ import annotations

import numpy as np
from gpu_limits import Share, decode_bytes, layer_bytes, prefill_flops, touched_experts
from gpu_plan import FULL
from gpu_profile import busy_time

SHAPE = FULL.shape


def test_one_rank_has_the_whole_model() -> None:
    one = Share(1, 1, "ep")
    assert one.layer_bytes(SHAPE, 50) == layer_bytes(SHAPE, 50)
    assert one.decode_bytes(SHAPE, 50, 8) == decode_bytes(SHAPE, 50, 8)
    assert one.prefill_flops(SHAPE, 100) == prefill_flops(SHAPE, 100)


def test_two_ranks_share_it() -> None:
    cut, whole, dp = Share(1, 2, "tp"), Share(1, 2, "ep"), Share(2, 1, "ep")
    router = 2 * SHAPE["num_hidden_layers"] * SHAPE["hidden_size"] * SHAPE["num_experts"]
    assert 2 * cut.decode_bytes(SHAPE, 50, 8) == decode_bytes(SHAPE, 50, 8) + router
    assert cut.decode_bytes(SHAPE, 50, 8) == whole.decode_bytes(SHAPE, 25, 8)
    assert dp.decode_bytes(SHAPE, 25, 8) == decode_bytes(SHAPE, 25, 8)


def test_the_rank_that_reads_most_counts() -> None:
    # One step, two tokens, one layer, two of four experts each.
    routes = np.array([[[[0, 1]], [[1, 3]]]])
    assert touched_experts(routes) == 3
    assert Share(1, 2, "tp").touched(routes, 4) == 3
    assert Share(1, 2, "ep").touched(routes, 4) == Share(2, 1, "ep").touched(routes, 4) == 2
    assert Share(1, 1, "ep").touched(routes, 4) == 3
    # Ids as they are shipped. Three of four choices fall on the first rank, whose mean is two.
    shipped = routes.astype(np.uint8)
    assert Share(1, 2, "ep").touched(shipped, 4) == 2
    assert Share(1, 2, "ep").imbalance(shipped, 4) == 1.5
    assert Share(1, 2, "tp").imbalance(shipped, 4) == Share(1, 1, "ep").imbalance(shipped, 4) == 1.0


def test_spans_that_overlap_count_once() -> None:
    assert busy_time([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4
    assert busy_time([]) == 0
