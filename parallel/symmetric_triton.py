"""Collectives of rows between the GPUs of one host, each in one kernel, with what comes before and after them.

A program handles a row: it stores what the others need of it in memory of theirs, tells each so by a flag, waits for
their flags and goes on with what they stored in memory of its own. Rows are numbered by calls: a row's n-th call uses one
of two places in turn, which is free again, because whoever has set a flag of call n has done with call n - 1. So there is
no barrier at the end, and kernels of this file may follow each other in any order that is the same on all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .triton_launch import Kernel, ceil_div, launch_options, power_of_2_from, start_next, wait_for_previous

# One thread's store that releases, and its wait with a load that acquires: without the round trip of an atomic operation.
_SEND = tl.constexpr(
    "{ .reg .pred p; .reg .u32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; "
    "@p st.release.sys.global.b32 [$1], $2; mov.u32 $0, 0; }"
)
_WAIT = tl.constexpr(
    "{ .reg .pred p; .reg .u32 t; mov.u32 t, %tid.x; setp.ne.u32 p, t, 0; @p bra DONE; "
    "AGAIN: ld.acquire.sys.global.b32 t, [$1]; sub.s32 t, t, $2; setp.lt.s32 p, t, 0; @p bra AGAIN; "
    "DONE: mov.u32 $0, 0; }"
)


@triton.jit
def _meet(flags, flags_of, place, call, RANK: tl.constexpr, SIZE: tl.constexpr, ASM: tl.constexpr):
    """This rank's stores for a place are there for all; returns when those of all others are."""
    tl.debug_barrier()
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            theirs = tl.load(flags_of + peer).to(tl.pointer_type(tl.int32)) + place * SIZE + RANK
            if ASM:
                tl.inline_asm_elementwise(
                    _SEND, "=r,l,r", [theirs.to(tl.int64), call], dtype=tl.int32, is_pure=False, pack=1
                )
            else:
                tl.atomic_xchg(theirs, call, sem="release", scope="sys")
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            own = flags + place * SIZE + peer
            if ASM:
                tl.inline_asm_elementwise(
                    _WAIT, "=r,l,r", [own.to(tl.int64), call], dtype=tl.int32, is_pure=False, pack=1
                )
            else:
                seen = tl.atomic_add(own, 0, sem="acquire", scope="sys")
                # Calls may overflow: their difference does not.
                while seen - call < 0:
                    seen = tl.atomic_add(own, 0, sem="acquire", scope="sys")
    tl.debug_barrier()


@Kernel
@triton.jit
def _sum_rows_kernel(
    x, out, residual, weight, calls, flags, data_of, flags_of, num_rows, num_columns, row_bytes, eps,
    RANK: tl.constexpr, SIZE: tl.constexpr, NUM_PLACES: tl.constexpr, ROWS: tl.constexpr, SCATTER: tl.constexpr,
    NORM: tl.constexpr, BLOCK: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Terms are added in rank order, so that every rank gets the same bits."""
    start_next(PDL)
    place = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    dtype = x.dtype.element_ty
    if NORM:
        scale = tl.load(weight + columns, inside, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    call = tl.load(calls + place) + 1
    turn = ((call & 1) * NUM_PLACES + place).to(tl.int64) * SIZE * ROWS * row_bytes
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            theirs = tl.load(data_of + peer) + turn + RANK * ROWS * row_bytes
            for index in tl.static_range(ROWS):
                row = place * ROWS + index
                mask = inside & (row < num_rows)
                source = (row + peer * num_rows * SCATTER).to(tl.int64) * num_columns
                value = tl.load(x + source + columns, mask, other=0.0)
                tl.store((theirs + index * row_bytes).to(tl.pointer_type(dtype)) + columns, value, mask)
    _meet(flags, flags_of, place, call, RANK, SIZE, ASM)
    own = tl.load(data_of + RANK) + turn
    for index in tl.static_range(ROWS):
        row = place * ROWS + index
        mask = inside & (row < num_rows)
        total = tl.zeros((BLOCK,), tl.float32)
        for peer in tl.static_range(SIZE):
            if peer == RANK:
                source = (row + RANK * num_rows * SCATTER).to(tl.int64) * num_columns
                value = tl.load(x + source + columns, mask, other=0.0)
            else:
                sent = (own + (peer * ROWS + index) * row_bytes).to(tl.pointer_type(dtype))
                value = tl.load(sent + columns, mask, other=0.0, volatile=True)
            total += value.to(tl.float32)
        where = row.to(tl.int64) * num_columns + columns
        value = total.to(dtype)
        if NORM:
            value = (value.to(tl.float32) + tl.load(residual + where, mask, other=0.0).to(tl.float32)).to(dtype)
            tl.store(residual + where, value, mask)
            wide = value.to(tl.float32)
            wide = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / num_columns + eps)
            value = (wide.to(dtype).to(tl.float32) * scale).to(dtype)
        tl.store(out + where, value, mask)
    tl.store(calls + place, call)


@Kernel
@triton.jit
def _gather_routed_kernel(
    hidden, ids, weights, padding, out, out_ids, out_weights, record, calls, flags, data_of, flags_of, num_rows,
    num_columns, row_bytes, ids_at, weights_at, first_recorded, num_recorded, RANK: tl.constexpr, SIZE: tl.constexpr,
    NUM_PLACES: tl.constexpr, ROWS: tl.constexpr, TOP_K: tl.constexpr, K_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
    PADDED: tl.constexpr, RECORD: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A row is sent with its ids from byte `ids_at` and its weights from byte `weights_at` on."""
    start_next(PDL)
    place = tl.program_id(0)
    columns, choices = tl.arange(0, BLOCK), tl.arange(0, K_BLOCK)
    dtype = hidden.dtype.element_ty
    wait_for_previous(PDL)
    call = tl.load(calls + place) + 1
    turn = ((call & 1) * NUM_PLACES + place).to(tl.int64) * SIZE * ROWS * row_bytes
    for index in tl.static_range(ROWS):
        row = place * ROWS + index
        mask, kept = (columns < num_columns) & (row < num_rows), (choices < TOP_K) & (row < num_rows)
        its_row = tl.load(hidden + row.to(tl.int64) * num_columns + columns, mask, other=0.0)
        its_ids = tl.load(ids + row.to(tl.int64) * TOP_K + choices, kept, other=-1).to(tl.int32)
        its_weights = tl.load(weights + row.to(tl.int64) * TOP_K + choices, kept, other=0.0)
        if PADDED:
            its_ids = tl.where(tl.load(padding + row, row < num_rows, other=1) != 0, -1, its_ids)
        for peer in tl.static_range(SIZE):
            if peer == RANK:
                # Into the results at once.
                where = (row + RANK * num_rows).to(tl.int64)
                tl.store(out + where * num_columns + columns, its_row, mask)
                tl.store(out_ids + where * TOP_K + choices, its_ids.to(tl.int64), kept)
                tl.store(out_weights + where * TOP_K + choices, its_weights, kept)
                if RECORD:
                    at = row + RANK * num_rows - first_recorded
                    recorded = kept & (at >= 0) & (at < num_recorded)
                    tl.store(record + at.to(tl.int64) * TOP_K + choices, its_ids.to(record.dtype.element_ty), recorded)
            else:
                theirs = tl.load(data_of + peer) + turn + (RANK * ROWS + index) * row_bytes
                tl.store(theirs.to(tl.pointer_type(dtype)) + columns, its_row, mask)
                tl.store((theirs + ids_at).to(tl.pointer_type(tl.int32)) + choices, its_ids, kept)
                tl.store((theirs + weights_at).to(tl.pointer_type(dtype)) + choices, its_weights, kept)
    _meet(flags, flags_of, place, call, RANK, SIZE, ASM)
    own = tl.load(data_of + RANK) + turn
    for index in tl.static_range(ROWS):
        row = place * ROWS + index
        mask, kept = (columns < num_columns) & (row < num_rows), (choices < TOP_K) & (row < num_rows)
        for peer in tl.static_range(SIZE):
            if peer != RANK:
                sent = own + (peer * ROWS + index) * row_bytes
                where = (row + peer * num_rows).to(tl.int64)
                its_row = tl.load(sent.to(tl.pointer_type(dtype)) + columns, mask, other=0.0, volatile=True)
                tl.store(out + where * num_columns + columns, its_row, mask)
                its_ids = tl.load(
                    (sent + ids_at).to(tl.pointer_type(tl.int32)) + choices, kept, other=-1, volatile=True
                )
                tl.store(out_ids + where * TOP_K + choices, its_ids.to(tl.int64), kept)
                weights_sent = (sent + weights_at).to(tl.pointer_type(dtype))
                its_weights = tl.load(weights_sent + choices, kept, other=0.0, volatile=True)
                tl.store(out_weights + where * TOP_K + choices, its_weights, kept)
                if RECORD:
                    at = row + peer * num_rows - first_recorded
                    recorded = kept & (at >= 0) & (at < num_recorded)
                    tl.store(record + at.to(tl.int64) * TOP_K + choices, its_ids.to(record.dtype.element_ty), recorded)
    tl.store(calls + place, call)


@dataclass(frozen=True)
class Lane:
    """One rank's end of memory that the ranks write to each other, for steps of up to `num_places * rows` rows.

    `calls` [places] int32 counts each place's calls, `flags` [places, n] int32 are this rank's, by place and the rank that
    sets them; `data_of` and `flags_of` [n] int64 are addresses: each rank's memory [2, places, n, rows] of `row_bytes`, and
    its flags.
    """

    calls: torch.Tensor
    flags: torch.Tensor
    data_of: torch.Tensor
    flags_of: torch.Tensor
    rows: int
    row_bytes: int
    rank: int
    asm: bool

    @property
    def constants(self) -> dict[str, Any]:
        sizes = {"RANK": self.rank, "SIZE": len(self.data_of), "NUM_PLACES": len(self.calls), "ROWS": self.rows}
        return {**sizes, "ASM": self.asm, **launch_options(self.calls.device)}


@dataclass(frozen=True)
class AddNorm:
    """What follows a sum: `residual` [P, D] is added, and the sum of both, which replaces it, is normed."""

    residual: torch.Tensor
    weight: torch.Tensor
    eps: float


def sum_rows(x: torch.Tensor, lane: Lane, *, scatter: bool, then: AddNorm | None = None) -> torch.Tensor:
    """Sum of the ranks' x [T, D] - with `scatter` this rank's share of its rows, [T / n, D] - with what follows it."""
    num_rows, num_columns = x.shape
    if scatter:
        num_rows //= len(lane.data_of)
    out = x.new_empty(num_rows, num_columns)
    residual, weight, eps = (x, x, 0.0) if then is None else (then.residual, then.weight, then.eps)
    _sum_rows_kernel[(ceil_div(num_rows, lane.rows),)](
        x, out, residual, weight, lane.calls, lane.flags, lane.data_of, lane.flags_of, num_rows, num_columns,
        lane.row_bytes, eps, SCATTER=int(scatter), NORM=then is not None, BLOCK=power_of_2_from(num_columns),
        # As the norm alone has it, so that their bits are the same.
        num_warps=4, **lane.constants,
    )  # fmt: skip
    return out


def gather_routed(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    is_padding: torch.Tensor | None,
    lane: Lane,
    offsets: tuple[int, int],
    record: torch.Tensor | None,
    first_recorded: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states [P, D], ids and weights [P, K] of all ranks in rank order, ids of padding -1.

    Args:
        offsets: where a row's ids and weights stand in what is sent, in bytes.
        record: [R, K], where ids of rows from `first_recorded` on are also written.
    """
    (num_rows, num_columns), top_k, size = hidden.shape, ids.shape[1], len(lane.data_of)
    out = hidden.new_empty(size * num_rows, num_columns)
    out_ids, out_weights = (x.new_empty(size * num_rows, top_k) for x in (ids, weights))
    recorded = ids if record is None else record
    _gather_routed_kernel[(ceil_div(num_rows, lane.rows),)](
        hidden, ids, weights, ids if is_padding is None else is_padding.view(torch.uint8), out, out_ids, out_weights,
        recorded, lane.calls, lane.flags, lane.data_of, lane.flags_of, num_rows, num_columns, lane.row_bytes, *offsets,
        first_recorded, len(recorded), TOP_K=top_k, K_BLOCK=power_of_2_from(top_k), BLOCK=power_of_2_from(num_columns),
        PADDED=is_padding is not None, RECORD=record is not None, num_warps=4, **lane.constants,
    )  # fmt: skip
    return out, out_ids, out_weights
