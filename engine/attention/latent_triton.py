"""Decode attention over latents, straight over the pages, in Triton (MLA in the absorbed form, DeepSeek-V2, 2024).

A latent is key and value of all heads at once: the heads of a request are the rows of one tile, and a block of latents is
read once, for the scores and for the sums. Splits over keys, lengths and pages are as in `triton_paged.py`.

Legend: B requests, H query heads, L width of a latent, R width of the rotated key, S slots.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...parallel.triton_launch import Kernel, ceil_div, launch_options, power_of_2_from, start_next, wait_for_previous
from .decode_plan import DecodePlan
from .split_merge_triton import choose_num_splits, merge_splits

# Rows of the matrix unit's smallest tile, and of the largest whose sums fit into registers. More heads than that take
# several programs, which read a latent one after the other: from the second-level cache, but for the first.
MIN_ROWS = 16
MAX_ROWS = 32
# By the rows of a program: keys that it reads at a time, its warps and pipeline stages.
TILES = {16: (32, 4, 3), 32: (64, 4, 2)}
# Programs that keep the device busy.
WANTED_PROGRAMS = 256
MAX_SPLITS = 64


@Kernel
@triton.jit
def _latent_decode_kernel(
    content, rope, cache, page_table, req_rows, kv_lens, out, partial, lse, scale, table_stride, content_token_stride,
    content_head_stride, rope_token_stride, rope_head_stride, NUM_HEADS: tl.constexpr, RANK: tl.constexpr,
    ROPE: tl.constexpr, PAGE_SIZE: tl.constexpr, NUM_SPLITS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    start_next(PDL)
    head_block, request, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    # Read past the first-level cache, which may hold another step's.
    length = tl.load(kv_lens + request, cache_modifier=".cg").to(tl.int32)
    table = page_table + tl.load(req_rows + request, cache_modifier=".cg") * table_stride
    per_split = tl.cdiv(tl.cdiv(length, BLOCK), NUM_SPLITS) * BLOCK
    first = split * per_split
    end = tl.minimum(first + per_split, length)
    heads = head_block * ROWS + tl.arange(0, ROWS)
    is_head = heads[:, None] < NUM_HEADS
    columns, rope_columns = tl.arange(0, RANK), tl.arange(0, ROPE)
    position = first + tl.arange(0, BLOCK)
    page = tl.load(table + position // PAGE_SIZE, position < end, other=0, cache_modifier=".cg")
    wait_for_previous(PDL)
    content += request * content_token_stride + heads[:, None] * content_head_stride
    rope += request * rope_token_stride + heads[:, None] * rope_head_stride
    q_content = tl.load(content + columns[None, :], is_head, other=0.0)
    q_rope = tl.load(rope + rope_columns[None, :], is_head, other=0.0)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, RANK), tl.float32)
    for start in range(first, end, BLOCK):
        position = start + tl.arange(0, BLOCK)
        inside = position < end
        where = cache + (page.to(tl.int64) * PAGE_SIZE + position % PAGE_SIZE)[:, None] * (RANK + ROPE)
        position += BLOCK
        page = tl.load(table + position // PAGE_SIZE, position < end, other=0, cache_modifier=".cg")
        latents = tl.load(where + columns[None, :], inside[:, None], other=0.0)
        keys = tl.load(where + RANK + rope_columns[None, :], inside[:, None], other=0.0)
        scores = tl.dot(q_content, tl.trans(latents), input_precision="ieee")
        scores = tl.dot(q_rope, tl.trans(keys), scores, input_precision="ieee") * scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=1))
        weights = tl.exp(scores - new_best[:, None])
        shrink = tl.exp(best - new_best)
        acc = tl.dot(weights.to(latents.dtype), latents, acc * shrink[:, None], input_precision="ieee")
        total = total * shrink + tl.sum(weights, axis=1)
        best = new_best
    # A split without keys has weight exp(-inf) in the merge; its zeros must not be divided by its zero total.
    attended = acc / tl.where(total > 0, total, 1.0)[:, None]
    place = request * NUM_HEADS + heads
    if NUM_SPLITS == 1:
        tl.store(out + place[:, None] * RANK + columns[None, :], attended.to(out.dtype.element_ty), is_head)
    else:
        place = place * NUM_SPLITS + split
        tl.store(partial + place[:, None] * RANK + columns[None, :], attended, is_head)
        log_sum = tl.where(total > 0, best + tl.log(total), float("-inf"))
        tl.store(lse + place, log_sum, heads < NUM_HEADS)


def latent_decode_attention(
    content: torch.Tensor, rope: torch.Tensor, cache: torch.Tensor, plan: DecodePlan, scale: float
) -> torch.Tensor:
    """One query token per request: absorbed queries [B, H, L] and rotated ones [B, H, R] of any strides but the last, cache
    [S, L + R] -> weighted sums of latents [B, H, L]. L and R are powers of two, from 16 on."""
    num_reqs, num_heads, rank = content.shape
    # Tiles of float32 are half as large.
    shrink = cache.element_size() // 2
    rows = min(MAX_ROWS // shrink, max(MIN_ROWS, power_of_2_from(num_heads)))
    num_blocks, (block, num_warps, num_stages) = ceil_div(num_heads, rows), TILES[rows]
    num_splits = choose_num_splits(num_reqs * num_blocks, WANTED_PROGRAMS, MAX_SPLITS)
    out = content.new_empty(num_reqs, num_heads, rank)
    partial, lse = out, out
    if num_splits > 1:
        partial = content.new_empty(num_reqs, num_heads, num_splits, rank, dtype=torch.float32)
        lse = content.new_empty(num_reqs, num_heads, num_splits, dtype=torch.float32)
    _latent_decode_kernel[(num_blocks, num_reqs, num_splits)](
        content, rope, cache, plan.page_table, plan.req_rows, plan.kv_lens, out, partial, lse, scale,
        plan.page_table.stride(0), content.stride(0), content.stride(1), rope.stride(0), rope.stride(1),
        NUM_HEADS=num_heads, RANK=rank, ROPE=rope.shape[2], PAGE_SIZE=plan.page_size, NUM_SPLITS=num_splits, ROWS=rows,
        BLOCK=block // shrink, num_warps=num_warps, num_stages=num_stages, **launch_options(cache.device),
    )  # fmt: skip
    if num_splits > 1:
        merge_splits(partial, lse, out)
    return out
