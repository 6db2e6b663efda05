"""Collectives of rows between the GPUs of one host, each in one kernel, with what comes before and after them.

A program handles a row: it stores what the others need of it in memory of theirs, waits for what they store in memory of
its own, and goes on with that. Rows are numbered by calls: a row's n-th call uses one of two places in turn, which is free
again, because whoever has sent something of call n has done with call n - 1. So there is no barrier at the end, and kernels
of this file may follow each other in any order that is the same on all ranks, on one stream each. Programs of a kernel must
start in the order of their rows where there are more than the device holds at a time: then the first ones meet first.

That a row is there is told in one of two ways. Few rows travel as packets, 32 bits of data and the call's number in one
store of 64 bits: nobody waits for anything but the last packet (as NCCL's protocol LL). Many rows travel as they are, half
the bytes, with a flag behind them that releases them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .symmetric_memory import WORD_BYTES
from .triton_launch import Kernel, launch_options, power_of_2_from, start_next, wait_for_previous


@triton.jit
def send_words(place, words, lanes, there, call):
    """Words as packets of a call, to lanes of a place."""
    packets = (call.to(tl.int64) << 32) | (words.to(tl.int64) & 0xFFFFFFFF)
    tl.store(place.to(tl.pointer_type(tl.int64)) + lanes, packets, there)


@triton.jit
def receive_words(place, lanes, there, call):
    """The words, as soon as all packets are of this call."""
    packets = tl.load(place.to(tl.pointer_type(tl.int64)) + lanes, there, other=0, volatile=True)
    late = tl.sum((there & ((packets >> 32).to(tl.int32) != call)).to(tl.int32), axis=0)
    while late > 0:
        packets = tl.load(place.to(tl.pointer_type(tl.int64)) + lanes, there, other=0, volatile=True)
        late = tl.sum((there & ((packets >> 32).to(tl.int32) != call)).to(tl.int32), axis=0)
    return (packets & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def _values_of(words, dtype: tl.constexpr, IN_PAIRS: tl.constexpr):
    """Words as values; of 16 bits there are two in one, the lower first."""
    if IN_PAIRS:
        low = (words & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
        high = ((words >> 16) & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
        return tl.interleave(low, high)
    else:
        return words.to(dtype, bitcast=True)


@triton.jit
def _word_of(value, SHORT: tl.constexpr):
    """A value, of 16 bits or of 32, in a word of its own."""
    if SHORT:
        return value.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    else:
        return value.to(tl.int32, bitcast=True)


@triton.jit
def _value_of(word, dtype: tl.constexpr, SHORT: tl.constexpr):
    if SHORT:
        return word.to(tl.int16).to(dtype, bitcast=True)
    else:
        return word.to(dtype, bitcast=True)


@triton.jit
def _meet(flags, flags_of, row, call, RANK: tl.constexpr, SIZE: tl.constexpr):
    """This rank's stores for a row are there for all; returns when those of all others are."""
    tl.debug_barrier()
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            theirs = tl.load(flags_of + peer).to(tl.pointer_type(tl.int32))
            tl.atomic_xchg(theirs + row * SIZE + RANK, call, sem="release", scope="sys")
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            seen = tl.atomic_add(flags + row * SIZE + peer, 0, sem="acquire", scope="sys")
            # Calls may overflow: their difference does not.
            while seen - call < 0:
                seen = tl.atomic_add(flags + row * SIZE + peer, 0, sem="acquire", scope="sys")
    tl.debug_barrier()


@Kernel
@triton.jit
def _sum_rows_kernel(
    x, x_words, out, residual, weight, calls, flags, data_of, flags_of, num_rows, num_columns, num_words, row_bytes, eps,
    RANK: tl.constexpr, SIZE: tl.constexpr, MAX_ROWS: tl.constexpr, SCATTER: tl.constexpr, NORM: tl.constexpr,
    BLOCK: tl.constexpr, WORDS: tl.constexpr, PACKETS: tl.constexpr, IN_PAIRS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Terms are added in rank order, so that every rank gets the same bits."""
    start_next(PDL)
    row = tl.program_id(0)
    columns, lanes = tl.arange(0, BLOCK), tl.arange(0, WORDS)
    mask, there = columns < num_columns, lanes < num_words
    dtype = x.dtype.element_ty
    if NORM:
        scale = tl.load(weight + columns, mask, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    call = tl.load(calls + row) + 1
    places = (((call & 1) * MAX_ROWS + row) * SIZE).to(tl.int64) * row_bytes
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            theirs = tl.load(data_of + peer) + places + RANK * row_bytes
            source = (row + peer * num_rows * SCATTER).to(tl.int64)
            if PACKETS:
                words = tl.load(x_words + source * num_words + lanes, there, other=0)
                send_words(theirs, words, lanes, there, call)
            else:
                value = tl.load(x + source * num_columns + columns, mask, other=0.0)
                tl.store(theirs.to(tl.pointer_type(dtype)) + columns, value, mask)
    if not PACKETS:
        _meet(flags, flags_of, row, call, RANK, SIZE)
    total = tl.zeros((BLOCK,), tl.float32)
    for peer in tl.static_range(SIZE):
        place = tl.load(data_of + RANK) + places + peer * row_bytes
        if peer == RANK:
            source = (row + RANK * num_rows * SCATTER).to(tl.int64)
            value = tl.load(x + source * num_columns + columns, mask, other=0.0)
        elif PACKETS:
            value = _values_of(receive_words(place, lanes, there, call), dtype, IN_PAIRS)
        else:
            value = tl.load(place.to(tl.pointer_type(dtype)) + columns, mask, other=0.0, volatile=True)
        total += value.to(tl.float32)
    where = row.to(tl.int64) * num_columns + columns
    value = total.to(dtype)
    if NORM:
        value = (value.to(tl.float32) + tl.load(residual + where, mask, other=0.0).to(tl.float32)).to(dtype)
        tl.store(residual + where, value, mask)
        wide = value.to(tl.float32)
        wide = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / num_columns + eps)
        value = (wide.to(weight.dtype.element_ty).to(tl.float32) * scale).to(dtype)
    tl.store(out + where, value, mask)
    tl.store(calls + row, call)


@triton.jit
def _keep_choices(
    out_ids, out_weights, record, where, ids, weights, choices, kept, first_recorded, num_recorded,
    TOP_K: tl.constexpr, RECORD: tl.constexpr,
):  # fmt: skip
    """A row's choices to its place in the world's, and to the record if that is one of its rows."""
    tl.store(out_ids + where * TOP_K + choices, ids.to(tl.int64), kept)
    tl.store(out_weights + where * TOP_K + choices, weights, kept)
    if RECORD:
        at = where - first_recorded
        recorded = kept & (at >= 0) & (at < num_recorded)
        tl.store(record + at * TOP_K + choices, ids.to(record.dtype.element_ty), recorded)


@Kernel
@triton.jit
def _gather_routed_kernel(
    hidden, hidden_words, ids, weights, padding, out, out_words, out_ids, out_weights, record, calls, flags, data_of,
    flags_of, num_rows, num_columns, num_words, row_bytes, first_recorded, num_recorded, RANK: tl.constexpr,
    SIZE: tl.constexpr, MAX_ROWS: tl.constexpr, TOP_K: tl.constexpr, K_BLOCK: tl.constexpr, WORDS: tl.constexpr,
    PADDED: tl.constexpr, RECORD: tl.constexpr, SHORT: tl.constexpr, PACKETS: tl.constexpr, IN_PAIRS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A row is sent as words: its hidden state, its ids and its weights, each of these in a word of its own."""
    start_next(PDL)
    row = tl.program_id(0)
    lanes, choices = tl.arange(0, WORDS), tl.arange(0, K_BLOCK)
    there, kept = lanes < num_words, choices < TOP_K
    dtype = weights.dtype.element_ty
    wait_for_previous(PDL)
    call = tl.load(calls + row) + 1
    places = (((call & 1) * MAX_ROWS + row) * SIZE).to(tl.int64) * row_bytes
    own_words = tl.load(hidden_words + row.to(tl.int64) * num_words + lanes, there, other=0)
    own_ids = tl.load(ids + row.to(tl.int64) * TOP_K + choices, kept, other=-1).to(tl.int32)
    own_weights = tl.load(weights + row.to(tl.int64) * TOP_K + choices, kept, other=0.0)
    if PADDED:
        own_ids = tl.where(tl.load(padding + row) != 0, -1, own_ids)
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            theirs = tl.load(data_of + peer) + places + RANK * row_bytes
            if PACKETS:
                send_words(theirs, own_words, lanes, there, call)
                send_words(theirs, own_ids, num_words + choices, kept, call)
                send_words(theirs, _word_of(own_weights, SHORT), num_words + TOP_K + choices, kept, call)
            else:
                target = theirs.to(tl.pointer_type(tl.int32))
                tl.store(target + lanes, own_words, there)
                tl.store(target + num_words + choices, own_ids, kept)
                tl.store(target + num_words + TOP_K + choices, _word_of(own_weights, SHORT), kept)
    if not PACKETS:
        _meet(flags, flags_of, row, call, RANK, SIZE)
    for peer in tl.static_range(SIZE):
        place = tl.load(data_of + RANK) + places + peer * row_bytes
        where = (row + peer * num_rows).to(tl.int64)
        if peer == RANK:
            its_words, its_ids, its_weights = own_words, own_ids, own_weights
        elif PACKETS:
            its_words = receive_words(place, lanes, there, call)
            its_ids = receive_words(place, num_words + choices, kept, call)
            its_weights = _value_of(receive_words(place, num_words + TOP_K + choices, kept, call), dtype, SHORT)
        else:
            source = place.to(tl.pointer_type(tl.int32))
            its_words = tl.load(source + lanes, there, other=0, volatile=True)
            its_ids = tl.load(source + num_words + choices, kept, other=-1, volatile=True)
            word = tl.load(source + num_words + TOP_K + choices, kept, other=0, volatile=True)
            its_weights = _value_of(word, dtype, SHORT)
        tl.store(out_words + where * num_words + lanes, its_words, there)
        _keep_choices(
            out_ids, out_weights, record, where, its_ids, its_weights, choices, kept, first_recorded, num_recorded,
            TOP_K, RECORD,
        )  # fmt: skip
    tl.store(calls + row, call)


@dataclass(frozen=True)
class Lane:
    """One rank's end of memory that the ranks write to each other, for up to R rows.

    `calls` [R] int32 counts each row's calls, `flags` [R, n] int32 are this rank's, by row and the rank that sets them;
    `data_of` and `flags_of` [n] int64 are addresses: each rank's places [2, R, n] of `row_bytes`, and its flags.
    """

    calls: torch.Tensor
    flags: torch.Tensor
    data_of: torch.Tensor
    flags_of: torch.Tensor
    row_bytes: int
    rank: int
    in_packets: bool

    def choices_a_row(self, num_choices: int) -> int:
        """How many scores and ids travel as one row, so that the rows suffice: a power of two."""
        return power_of_2_from(-(-num_choices // len(self.calls)))

    def constants(self, x: torch.Tensor) -> dict[str, Any]:
        """What kernels over this lane are compiled for, where rows of `x` travel."""
        in_pairs = x.itemsize < WORD_BYTES
        return {
            "RANK": self.rank,
            "SIZE": len(self.data_of),
            "MAX_ROWS": len(self.calls),
            "WORDS": power_of_2_from(x.shape[1]) // (2 if in_pairs else 1),
            "PACKETS": self.in_packets,
            "IN_PAIRS": in_pairs,
            # As the norm alone has it, so that sums of squares are taken in the same order.
            "num_warps": 4,
            **launch_options(x.device),
        }


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
    words = x.view(torch.int32)
    residual, weight, eps = (x, x, 0.0) if then is None else (then.residual, then.weight, then.eps)
    _sum_rows_kernel[(num_rows,)](
        x, words, out, residual, weight, lane.calls, lane.flags, lane.data_of, lane.flags_of, num_rows, num_columns,
        words.shape[1], lane.row_bytes, eps, SCATTER=int(scatter), NORM=then is not None,
        BLOCK=power_of_2_from(num_columns), **lane.constants(x),
    )  # fmt: skip
    return out


def gather_routed(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    is_padding: torch.Tensor | None,
    lane: Lane,
    record: torch.Tensor | None,
    first_recorded: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states [P, D], ids and weights [P, K] of all ranks in rank order, ids of padding -1. Those of rows from
    `first_recorded` on are also written to `record` [R, K]."""
    (num_rows, num_columns), top_k, size = hidden.shape, ids.shape[1], len(lane.data_of)
    out = hidden.new_empty(size * num_rows, num_columns)
    out_ids, out_weights = (x.new_empty(size * num_rows, top_k) for x in (ids, weights))
    words, recorded = hidden.view(torch.int32), ids if record is None else record
    _gather_routed_kernel[(num_rows,)](
        hidden, words, ids, weights, ids if is_padding is None else is_padding.view(torch.uint8), out,
        out.view(torch.int32), out_ids, out_weights, recorded, lane.calls, lane.flags, lane.data_of, lane.flags_of,
        num_rows, num_columns, words.shape[1], lane.row_bytes, first_recorded, len(recorded), TOP_K=top_k,
        K_BLOCK=power_of_2_from(top_k), PADDED=is_padding is not None, RECORD=record is not None,
        SHORT=weights.itemsize < WORD_BYTES,
        **lane.constants(hidden),
    )  # fmt: skip
    return out, out_ids, out_weights
