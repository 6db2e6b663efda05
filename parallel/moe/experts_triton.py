"""Experts for few tokens, in Triton: every expert's weights are read once, by as many programs as keep the device busy.

Each program serves one expert and one block of outputs. It finds the pairs (token, choice) of its expert by scanning the
ids, which are few, so nothing is sorted and nothing waits for the host. Experts without a pair cost an early exit.

Legend: T tokens, D hidden, F experts on this rank, K experts per token, I intermediate width on this rank, P = T * K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SCAN = 128


@triton.jit
def _pairs_of(ids, expert, first, num_pairs, ROWS: tl.constexpr, SCAN: tl.constexpr):
    """Pairs `first .. first + ROWS` of an expert, counted in order, plus one (0: there is none), and how many it has."""
    rows = tl.arange(0, ROWS)
    found = tl.zeros((ROWS,), tl.int32)
    count = 0
    for start in range(0, num_pairs, SCAN):
        pair = start + tl.arange(0, SCAN)
        hit = (tl.load(ids + pair, pair < num_pairs, other=-1) == expert).to(tl.int32)
        rank = count + tl.cumsum(hit, axis=0) - 1 - first
        match = (rank[None, :] == rows[:, None]) & (hit[None, :] > 0)
        found += tl.sum(tl.where(match, pair[None, :] + 1, 0), axis=1)
        count += tl.sum(hit, axis=0)
    return found, count


@triton.jit
def _gate_up_kernel(
    hidden, ids, gate_up, activated, num_pairs, width, intermediate, TOP_K: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    block, expert, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    found, count = _pairs_of(ids, expert, part * ROWS, num_pairs, ROWS, SCAN)
    if count <= part * ROWS:
        return
    dtype = hidden.dtype.element_ty
    there = found > 0
    pair = tl.where(there, found - 1, 0)
    token = (pair // TOP_K).to(tl.int64)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    kept = columns < intermediate
    steps = tl.arange(0, DEPTH)
    base = gate_up + expert.to(tl.int64) * 2 * intermediate * width + columns[None, :].to(tl.int64) * width
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, width, DEPTH):
        depth = start + steps
        x = tl.load(
            hidden + token[:, None] * width + depth[None, :], there[:, None] & (depth < width)[None, :], other=0.0
        )
        inside = (depth < width)[:, None] & kept[None, :]
        gate = tl.dot(x, tl.load(base + depth[:, None], inside, other=0.0), gate, input_precision="ieee")
        more = base + intermediate * width
        up = tl.dot(x, tl.load(more + depth[:, None], inside, other=0.0), up, input_precision="ieee")
    gate = gate.to(dtype).to(tl.float32)
    gate = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    value = (gate * up.to(dtype).to(tl.float32)).to(dtype)
    target = activated + pair[:, None].to(tl.int64) * intermediate + columns[None, :]
    tl.store(target, value, there[:, None] & kept[None, :])


@triton.jit
def _down_kernel(
    activated, ids, down, results, num_pairs, width, intermediate, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    block, expert, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    found, count = _pairs_of(ids, expert, part * ROWS, num_pairs, ROWS, SCAN)
    if count <= part * ROWS:
        return
    there = found > 0
    pair = tl.where(there, found - 1, 0).to(tl.int64)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    kept = columns < width
    steps = tl.arange(0, DEPTH)
    base = down + expert.to(tl.int64) * intermediate * width + columns[None, :].to(tl.int64) * intermediate
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, intermediate, DEPTH):
        depth = start + steps
        mask = there[:, None] & (depth < intermediate)[None, :]
        x = tl.load(activated + pair[:, None] * intermediate + depth[None, :], mask, other=0.0)
        inside = (depth < intermediate)[:, None] & kept[None, :]
        acc = tl.dot(x, tl.load(base + depth[:, None], inside, other=0.0), acc, input_precision="ieee")
    target = results + pair[:, None] * width + columns[None, :]
    tl.store(target, acc.to(results.dtype.element_ty), there[:, None] & kept[None, :])


@triton.jit
def _combine_kernel(
    results, ids, weights, out, num_experts, width, TOP_K: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    kept = columns < width
    dtype = out.dtype.element_ty
    acc = tl.zeros((COLUMNS,), tl.float32)
    for k in tl.static_range(TOP_K):
        pair = token * TOP_K + k
        expert = tl.load(ids + pair)
        held = (expert >= 0) & (expert < num_experts)
        value = tl.load(results + pair * width + columns, kept & held, other=0.0).to(tl.float32)
        acc += (value * tl.load(weights + pair).to(tl.float32)).to(dtype).to(tl.float32)
    tl.store(out + token * width + columns, acc.to(dtype), kept)


def experts_triton(
    hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """An `ExpertsFunction`; see experts.py. Costs a scan of all ids per program, so it is for few tokens."""
    (num_tokens, top_k), (num_local, width, intermediate) = ids.shape, down.shape
    num_pairs = num_tokens * top_k
    activated = hidden.new_empty(num_pairs, intermediate)
    results = hidden.new_empty(num_pairs, width)
    out = torch.empty_like(hidden)
    # A token chooses an expert at most once, so no expert has more pairs than there are tokens.
    rows = 16 if num_tokens <= 64 else 32
    parts = triton.cdiv(num_tokens, rows)
    few = num_tokens <= 4
    columns = (16, 32) if few else (32, 64)
    depth = 256 if few else 128
    if hidden.dtype == torch.float32:
        depth //= 4
    sizes = (num_pairs, width, intermediate)
    _gate_up_kernel[(triton.cdiv(intermediate, columns[0]), num_local, parts)](
        hidden, ids, gate_up, activated, *sizes, TOP_K=top_k, ROWS=rows, COLUMNS=columns[0], DEPTH=depth, SCAN=SCAN,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    _down_kernel[(triton.cdiv(width, columns[1]), num_local, parts)](
        activated, ids, down, results, *sizes, ROWS=rows, COLUMNS=columns[1], DEPTH=depth, SCAN=SCAN,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    block = min(512, triton.next_power_of_2(width))
    _combine_kernel[(num_tokens, triton.cdiv(width, block))](
        results, ids, weights, out, num_local, width, TOP_K=top_k, COLUMNS=block, num_warps=2
    )
    return out
