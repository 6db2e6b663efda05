"""Pieces of another rank's pool: the bytes that one would copy row by row, in fewer pieces."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from waybill.engine.disaggregation import read_plan
from waybill.engine.disaggregation.page_copy import Heads, as_rows
from waybill.engine.disaggregation.read_plan import ReadPlan, plan_reads, room_for, row_bytes
from waybill.engine.kv_cache.kv_store import StackPlace

DTYPES = [torch.float32, torch.bfloat16, torch.uint8]


@st.composite
def pools(draw: st.DrawFn) -> tuple[list[StackPlace], int, np.ndarray, Heads]:
    """Stacks in a memory of so many bytes, slots, and heads."""
    num_layers, num_slots = draw(st.integers(1, 3)), draw(st.integers(1, 24))
    num_heads = draw(st.integers(1, 4))
    stacks, end = [], 0
    for _ in range(draw(st.integers(1, 3))):
        width = (draw(st.integers(1, 5)),) if draw(st.booleans()) else (num_heads, draw(st.integers(1, 5)))
        end += 512 * draw(st.integers(0, 1))
        stacks.append(StackPlace(end, (num_layers, num_slots, *width), draw(st.sampled_from(DTYPES))))
        end += -(-stacks[-1].num_bytes // 512) * 512
    slots = draw(st.lists(st.integers(0, num_slots - 1), min_size=1, unique=True))
    slots = sorted(slots) if draw(st.booleans()) else slots
    first = draw(st.integers(0, num_heads - 1))
    heads = draw(st.sampled_from([None, (first, draw(st.integers(first + 1, num_heads)))]))
    return stacks, end, np.array(slots, dtype=np.int64), heads


def carry_out(plan: ReadPlan, pool: np.ndarray, room: np.ndarray) -> None:
    taken = np.zeros(len(room), dtype=bool)
    for theirs, ours, size in zip(plan.theirs, plan.ours, plan.num_bytes, strict=True):
        assert size > 0 and not taken[ours : ours + size].any()
        taken[ours : ours + size] = True
        room[ours : ours + size] = pool[theirs : theirs + size]


@settings(max_examples=150, deadline=None)
@given(pools(), st.sampled_from([0, 1, 1 << 14]))
def test_a_plan_reads_what_one_would_copy_row_by_row(
    drawn: tuple[list[StackPlace], int, np.ndarray, Heads], piece_bytes: int
) -> None:
    stacks, num_bytes, slots, heads = drawn
    pool = np.random.default_rng(0).integers(0, 256, num_bytes, dtype=np.uint8)
    with mock.patch.object(read_plan, "PIECE_BYTES", piece_bytes):
        plan = plan_reads(stacks, slots, heads)
    block = len(slots) * sum(stack.shape[0] * row_bytes(stack) for stack in stacks)
    room = np.zeros(room_for(stacks, block), dtype=np.uint8)
    carry_out(plan, pool, room)
    assert plan.heads in (None, heads)
    num_rows = 0
    for stack, part in zip(stacks, plan.parts, strict=True):
        # The list that needs no thought.
        rows = as_rows(stack, pool)
        wanted = [
            [
                rows[layer, slot] if heads is None or rows.ndim == 3 else rows[layer, slot, heads[0] : heads[1]]
                for slot in slots
            ]
            for layer in range(stack.shape[0])
        ]
        found = as_rows(part, room)
        found = found if plan.heads is None or found.ndim == 3 else found[:, :, plan.heads[0] : plan.heads[1]]
        assert np.array_equal(found, np.array(wanted))
        num_rows += stack.shape[0] * len(slots)
    assert len(plan.num_bytes) <= num_rows


STACK = StackPlace(0, (2, 64, 4, 8), torch.float32)
ROW = 4 * 8 * 4


def test_pages_that_lie_beside_each_other_are_one_piece_of_a_layer() -> None:
    plan = plan_reads([STACK], np.array([8, 9, 10, 11, 4, 5, 6, 7, 12]), None)
    layers = [0, 64 * ROW]
    assert plan.theirs.tolist() == [start + slot * ROW for start in layers for slot in (8, 4, 12)]
    assert plan.num_bytes.tolist() == [4 * ROW, 4 * ROW, ROW] * 2
    assert plan.ours.tolist() == [slot * ROW for slot in (0, 4, 8, 9, 13, 17)]


@pytest.mark.parametrize(
    ("slots", "num_pieces", "heads"),
    [
        # All heads of a run, and those not wanted left behind; with nothing to be won only what is wanted.
        (np.arange(8), 2, (1, 2)),
        (np.arange(0, 16, 2), 16, None),
    ],
)
def test_some_heads_of_rows(slots: np.ndarray, num_pieces: int, heads: Heads) -> None:
    plan = plan_reads([STACK], slots, (1, 2))
    assert len(plan.num_bytes) == num_pieces and plan.heads == heads
    pieces = [plan_reads([STACK], slots, all_heads).num_bytes.tolist() for all_heads in ((0, 4), None)]
    assert pieces[0] == pieces[1]
