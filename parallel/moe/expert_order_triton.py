"""Tokens in the order of their experts, and back, in Triton: what experts' kernels of every format are framed by.

Legend: T tokens, D hidden, F experts on this rank, K experts per token, P = T * K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_launch import Kernel, ceil_div, launch_options, power_of_2_from, start_next, wait_for_previous

MAX_SORTED_AT_ONCE = 16384


@Kernel
@triton.jit
def _sort_kernel(ids, order, ends, num_pairs, first, SCAN: tl.constexpr, ONCE: tl.constexpr, PDL: tl.constexpr):
    """One expert's pairs (token, choice), in their order, behind those of all experts before it; with ONCE all pairs are
    held at the same time."""
    start_next(PDL)
    wait_for_previous(PDL)
    expert = tl.program_id(0)
    lanes = tl.arange(0, SCAN)
    if ONCE:
        found = tl.load(ids + lanes, lanes < num_pairs, other=-1).to(tl.int32) - first
        hit = (found == expert).to(tl.int32)
        place = tl.sum(((found >= 0) & (found < expert)).to(tl.int32), axis=0)
        tl.store(order + place + tl.cumsum(hit, axis=0) - 1, lanes, hit > 0)
        tl.store(ends + expert, place + tl.sum(hit, axis=0))
    else:
        before = tl.zeros((SCAN,), tl.int32)
        for start in range(0, num_pairs, SCAN):
            pair = start + lanes
            found = tl.load(ids + pair, pair < num_pairs, other=-1) - first
            before += ((found >= 0) & (found < expert)).to(tl.int32)
        place = tl.sum(before, axis=0)
        for start in range(0, num_pairs, SCAN):
            pair = start + lanes
            hit = (tl.load(ids + pair, pair < num_pairs, other=-1) - first == expert).to(tl.int32)
            tl.store(order + place + tl.cumsum(hit, axis=0) - 1, pair, hit > 0)
            place += tl.sum(hit, axis=0)
        tl.store(ends + expert, place)


@triton.jit
def tile_of(ends, tile, num_experts, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """A tile's expert (`num_experts` or more: no such tile), its first place in the order, and its expert's end."""
    experts = tl.arange(0, EXPERTS)
    inside = experts < num_experts
    end = tl.load(ends + experts, inside, other=0)
    first = tl.load(ends + experts - 1, inside & (experts > 0), other=0)
    tiles = tl.where(inside, (end - first + ROWS - 1) // ROWS, 0)
    expert = tl.sum((tl.cumsum(tiles, axis=0) <= tile).to(tl.int32), axis=0)
    place = tile - tl.sum(tl.where(experts < expert, tiles, 0), axis=0)
    this = experts == expert
    return expert, tl.sum(tl.where(this, first, 0), axis=0) + place * ROWS, tl.sum(tl.where(this, end, 0), axis=0)


@Kernel
@triton.jit
def _combine_kernel(
    results, ids, weights, out, num_experts, width, first, TOP_K: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    start_next(PDL)
    wait_for_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    kept = columns < width
    dtype = out.dtype.element_ty
    acc = tl.zeros((COLUMNS,), tl.float32)
    for k in tl.static_range(TOP_K):
        pair = token * TOP_K + k
        expert = tl.load(ids + pair) - first
        held = (expert >= 0) & (expert < num_experts)
        value = tl.load(results + pair * width + columns, kept & held, other=0.0).to(tl.float32)
        acc += (value * tl.load(weights + pair).to(tl.float32)).to(dtype).to(tl.float32)
    tl.store(out + token * width + columns, acc.to(dtype), kept)


def sort_by_expert(ids: torch.Tensor, num_local: int, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs (token, choice) of ids [T, K] by local expert, those of experts elsewhere left out: [P] int32, and where each
    expert's end, [F] int32. Local experts are those from `first` on."""
    num_pairs = ids.numel()
    order = torch.empty(num_pairs, dtype=torch.int32, device=ids.device)
    ends = torch.empty(num_local, dtype=torch.int32, device=ids.device)
    lanes = max(128, power_of_2_from(num_pairs))
    once = lanes <= MAX_SORTED_AT_ONCE
    _sort_kernel[(num_local,)](
        ids, order, ends, num_pairs, first, SCAN=lanes if once else 4096, ONCE=once,
        num_warps=4 if lanes < 1024 else 8, **launch_options(ids.device),
    )  # fmt: skip
    return order, ends


def combine_pairs(
    results: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, num_local: int, first: int
) -> torch.Tensor:
    """Results of pairs [P, D], weighted and summed for each token: [T, D]."""
    (num_tokens, top_k), width = ids.shape, results.shape[1]
    out = results.new_empty(num_tokens, width)
    block = min(512, power_of_2_from(width))
    _combine_kernel[(num_tokens, ceil_div(width, block))](
        results, ids, weights, out, num_local, width, first, TOP_K=top_k, COLUMNS=block, num_warps=2,
        **launch_options(ids.device),
    )  # fmt: skip
    return out
