"""Twin of `best_choice_torch` in best_choice.py: one kernel, whose programs exchange what is best over symmetric memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .best_choice import MAX_ID, NO_CHOICE
from .symmetric_triton import Lane, receive_words, send_words
from .triton_launch import Kernel, ceil_div, launch_options, power_of_2_from, start_next, wait_for_previous


# How many rows there are differs from step to step, and must not have it compiled anew.
@Kernel
@triton.jit(do_not_specialize=["num_rows"])
def _best_choice_kernel(
    scores, ids, out, calls, data_of, num_rows, num_candidates, row_bytes, RANK: tl.constexpr, SIZE: tl.constexpr,
    MAX_ROWS: tl.constexpr, ROWS: tl.constexpr, CANDIDATES: tl.constexpr, MAX_ID: tl.constexpr, NO_CHOICE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A program's rows travel as one row of the lane: their scores, and behind them their ids."""
    start_next(PDL)
    group, lanes, candidates = tl.program_id(0), tl.arange(0, ROWS), tl.arange(0, CANDIDATES)
    rows = group * ROWS + lanes
    there = rows < num_rows
    mask = there[:, None] & (candidates < num_candidates)[None, :]
    where = rows[:, None] * num_candidates + candidates[None, :]
    wait_for_previous(PDL)
    score = tl.load(scores + where, mask, other=float("-inf"))
    of_candidate = tl.load(ids + where, mask, other=MAX_ID).to(tl.int32)
    is_bad = tl.max((score != score).to(tl.int32), axis=1)
    best = tl.max(tl.where(score != score, float("-inf"), score), axis=1)
    chosen = tl.min(tl.where(score == best[:, None], of_candidate, MAX_ID), axis=1)
    if SIZE > 1:
        sent = tl.where(is_bad > 0, float("nan"), best)
        call = tl.load(calls + group) + 1
        places = (((call & 1) * MAX_ROWS + group) * SIZE).to(tl.int64) * row_bytes
        for peer in tl.static_range(SIZE):
            if peer != RANK:
                theirs = tl.load(data_of + peer) + places + RANK * row_bytes
                send_words(theirs, sent.to(tl.int32, bitcast=True), lanes, there, call)
                send_words(theirs, chosen, ROWS + lanes, there, call)
        for peer in tl.static_range(SIZE):
            if peer != RANK:
                place = tl.load(data_of + RANK) + places + peer * row_bytes
                other = receive_words(place, lanes, there, call).to(tl.float32, bitcast=True)
                other_id = receive_words(place, ROWS + lanes, there, call)
                is_bad = tl.maximum(is_bad, (other != other).to(tl.int32))
                is_better = (other > best) | ((other == best) & (other_id < chosen))
                chosen = tl.where(is_better, other_id, chosen)
                best = tl.where(is_better, other, best)
        tl.store(calls + group, call)
    is_choice = (is_bad == 0) & (best > float("-inf")) & (best < float("inf"))
    tl.store(out + rows, tl.where(is_choice, chosen, NO_CHOICE).to(tl.int64), there)


def best_choice_triton(scores: torch.Tensor, ids: torch.Tensor, lane: Lane | None) -> torch.Tensor:
    """See `best_choice`; over the ranks of a lane of packets, or on one rank."""
    num_rows, num_candidates = scores.shape
    out = torch.empty(num_rows, dtype=torch.int64, device=scores.device)
    rows = 1
    calls, data_of, row_bytes, constants = out, out, 0, {"RANK": 0, "SIZE": 1, "MAX_ROWS": 1}
    if lane is not None:
        calls, data_of, row_bytes = lane.calls, lane.data_of, lane.row_bytes
        constants = {"RANK": lane.rank, "SIZE": len(data_of), "MAX_ROWS": len(calls)}
        rows = lane.choices_a_row(num_rows)
    _best_choice_kernel[(ceil_div(num_rows, rows),)](
        scores, ids, out, calls, data_of, num_rows, num_candidates, row_bytes, ROWS=rows,
        CANDIDATES=power_of_2_from(num_candidates), MAX_ID=MAX_ID, NO_CHOICE=NO_CHOICE, num_warps=1,
        **constants, **launch_options(scores.device),
    )  # fmt: skip
    return out
