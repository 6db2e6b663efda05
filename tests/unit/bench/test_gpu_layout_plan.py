"""Which layouts a machine gets, and how many requests of each."""

from __future__ import annotations

import pytest
from gpu_layout_plan import LAYOUTS, fitting_totals, largest_dp, layouts_for, plan_of, requests_of, totals_of
from gpu_limits import Share, decode_bytes, layer_bytes
from gpu_plan import FULL, TOY, Plan

H100_BYTES, H200_BYTES = 79 << 30, 139 << 30


@pytest.mark.parametrize(
    ("num_devices", "allowed", "dp"),
    [
        (1, {"tp1"}, 1),
        (2, {"tp1", "tp2-tp", "tp2-ep", "dp2"}, 2),
        (4, {"tp1", "tp2-tp", "tp2-ep", "dp2", "tp4-tp", "tp4-ep", "dp4", "dp2-tp2"}, 4),
        (8, set(LAYOUTS), 8),
    ],
)
def test_layouts_by_the_number_of_devices(num_devices: int, allowed: set[str], dp: int) -> None:
    run, not_run = layouts_for([], num_devices)
    assert set(run) == allowed
    assert [name for name in LAYOUTS if name in run or name in not_run] == list(LAYOUTS)
    assert largest_dp(run) == dp


def test_layouts_that_are_asked_for() -> None:
    assert layouts_for(["tp1", "dp8", "tp4-ep"], 4) == (["tp1", "tp4-ep"], ["dp8"])
    assert largest_dp(["dp4-tp2", "tp8-ep"]) == 1


def test_all_layouts_of_up_to_eight_ranks() -> None:
    found = {(share.dp, share.tp) for share in LAYOUTS.values()}
    assert found == {(1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (4, 1), (8, 1), (2, 2), (4, 2)}


@pytest.mark.parametrize("total", [1, 8, 13, 1024])
@pytest.mark.parametrize("dp_size", [1, 2, 8])
def test_requests_are_shared_out(total: int, dp_size: int) -> None:
    parts = [requests_of(total, rank, dp_size) for rank in range(dp_size)]
    assert sum(parts) == total and max(parts) == parts[0] and max(parts) - min(parts) <= 1


def test_a_plan_has_what_its_busiest_rank_decodes() -> None:
    plan = plan_of(FULL, Share(8, 1, "ep"), (1, 64, 1024))
    assert plan.batches == (1, 8, 128)
    assert plan.kv_tokens == 128 * 640


def test_one_device_also_decodes_what_two_groups_have() -> None:
    assert totals_of("tp1", FULL) == (1, 2, 8, 16, 64, 128, 256, 512, 1024)
    assert totals_of("dp8", FULL) == FULL.totals == (1, 8, 64, 256, 1024)


@pytest.mark.parametrize("plan", [FULL, TOY], ids=lambda plan: plan.device)
def test_every_request_has_room_for_what_it_decodes(plan: Plan) -> None:
    for total in plan.totals:
        tokens = total * (plan.context + plan.decode_tokens(total))
        assert tokens <= plan_of(plan, Share(1, 1, "ep"), (total,)).kv_tokens


@pytest.mark.parametrize(
    ("layout", "memory_bytes", "most"),
    [
        # 60 GB of weights, and 63 MB a request.
        ("tp1", H100_BYTES, 256),
        ("tp1", H200_BYTES, 1024),
        ("dp2", H100_BYTES, 1024),
        ("tp8-tp", H100_BYTES, 1024),
        ("dp8", H100_BYTES, 1024),
    ],
)
def test_requests_that_a_device_has_memory_for(layout: str, memory_bytes: int, most: int) -> None:
    totals = totals_of(layout, FULL)
    assert fitting_totals(FULL, LAYOUTS[layout], totals, memory_bytes) == tuple(t for t in totals if t <= most)


def test_one_rank_has_all() -> None:
    alone = Share(1, 1, "ep")
    assert alone.layer_bytes(FULL.shape, 50) == layer_bytes(FULL.shape, 50)
    assert alone.decode_bytes(FULL, 50, 64) == decode_bytes(FULL, 50, 64)


def test_more_ranks_than_key_heads_share_no_key_head_further() -> None:
    """Four key heads: each of eight ranks has one."""
    assert [Share(1, tp, "tp").kv_part(FULL.shape) for tp in (1, 2, 4, 8)] == [1, 1 / 2, 1 / 4, 1 / 4]
    of_four, of_eight = (Share(1, tp, "tp").decode_bytes(FULL, 0, 1024) for tp in (4, 8))
    keys = 2 * 48 * 1024 * 1024 * (FULL.context + 8 + FULL.num_steps / 2)
    assert of_four > of_eight > keys / 4
