"""`LayerOps.latent_rope_store` as one Triton kernel, with the roundings of its torch twin."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...parallel.triton_launch import Kernel, ceil_div, launch_options, power_of_2_from, start_next, wait_for_previous
from .norm_rope import LatentNorm

# Heads that one program turns.
HEADS = 8


@triton.jit
def _rotate(base, turned, cos, sin, mask, HALF: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The rows at `base` [n, 1], 2 HALF wide, to those at `turned`."""
    pairs = tl.arange(0, BLOCK)[None, :]
    mask = mask & (pairs < HALF)
    dtype = base.dtype.element_ty
    if INTERLEAVED:
        first = tl.load(base + 2 * pairs, mask, other=0.0).to(tl.float32)
        second = tl.load(base + 2 * pairs + 1, mask, other=0.0).to(tl.float32)
    else:
        first = tl.load(base + pairs, mask, other=0.0).to(tl.float32)
        second = tl.load(base + HALF + pairs, mask, other=0.0).to(tl.float32)
    c = tl.load(cos + pairs, pairs < HALF, other=0.0).to(tl.float32)
    s = tl.load(sin + pairs, pairs < HALF, other=0.0).to(tl.float32)
    left = (first * c).to(dtype).to(tl.float32) - (second * s).to(dtype).to(tl.float32)
    right = (second * c).to(dtype).to(tl.float32) + (first * s).to(dtype).to(tl.float32)
    tl.store(turned + pairs, left.to(dtype), mask)
    tl.store(turned + HALF + pairs, right.to(dtype), mask)


@Kernel
@triton.jit
def _latent_rope_store_kernel(
    query, compressed, weight, cos, sin, kv_slots, cache, out, query_stride, compressed_stride, eps,
    NUM_HEADS: tl.constexpr, CONTENT: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr,
    CONTENT_BLOCK: tl.constexpr, RANK_BLOCK: tl.constexpr, PAIR_BLOCK: tl.constexpr, HEADS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A token's latent and key in the first program, a block of its query heads in each of the others."""
    start_next(PDL)
    wait_for_previous(PDL)
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cos += token * ROPE
    sin += token * ROPE
    if block == 0:
        ranks = tl.arange(0, RANK_BLOCK)
        is_rank = ranks < RANK
        row = compressed + token * compressed_stride
        dtype = row.dtype.element_ty
        wide = tl.load(row + ranks, is_rank, other=0.0).to(tl.float32)
        scale = tl.load(weight + ranks, is_rank, other=0.0).to(tl.float32)
        wide = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / RANK + eps)
        slot = cache + tl.load(kv_slots + token) * (RANK + ROPE)
        tl.store(slot + ranks, (wide.to(dtype).to(tl.float32) * scale).to(dtype), is_rank)
        key = RANK + tl.zeros((1, 1), tl.int64)
        _rotate(row + key, slot + key, cos, sin, key == RANK, ROPE // 2, PAIR_BLOCK, INTERLEAVED)
    else:
        heads = ((block - 1) * HEADS + tl.arange(0, HEADS))[:, None]
        columns = tl.arange(0, CONTENT_BLOCK)[None, :]
        is_head = heads < NUM_HEADS
        base = query + token * query_stride + heads * (CONTENT + ROPE)
        target = out + (token * NUM_HEADS + heads) * (CONTENT + ROPE)
        is_content = is_head & (columns < CONTENT)
        tl.store(target + columns, tl.load(base + columns, is_content, other=0.0), is_content)
        _rotate(base + CONTENT, target + CONTENT, cos, sin, is_head, ROPE // 2, PAIR_BLOCK, INTERLEAVED)


def latent_rope_store_triton(
    query: torch.Tensor,
    compressed: torch.Tensor,
    norm: LatentNorm,
    rope: tuple[torch.Tensor, torch.Tensor],
    kv_slots: torch.Tensor,
    cache: torch.Tensor,
) -> torch.Tensor:
    """See `LayerOps`."""
    (num_tokens, num_heads, width), rope_width = query.shape, rope[0].shape[-1]
    content, rank = width - rope_width, len(norm.weight)
    out = query.new_empty(query.shape)
    _latent_rope_store_kernel[(num_tokens, 1 + ceil_div(num_heads, HEADS))](
        query, compressed, norm.weight, *rope, kv_slots, cache, out, query.stride(0), compressed.stride(0), norm.eps,
        NUM_HEADS=num_heads, CONTENT=content, RANK=rank, ROPE=rope_width, INTERLEAVED=norm.is_interleaved,
        CONTENT_BLOCK=power_of_2_from(content), RANK_BLOCK=power_of_2_from(rank),
        PAIR_BLOCK=power_of_2_from(rope_width // 2), HEADS=HEADS, num_warps=4, **launch_options(query.device),
    )  # fmt: skip
    return out
