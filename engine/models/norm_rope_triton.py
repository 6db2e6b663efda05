"""One Triton kernel per operation of `norm_rope.py`, with the roundings of its torch twin."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .norm_rope import HeadNorms


@triton.jit
def _rms_norm_kernel(x, residual, weight, out, num_columns, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * num_columns
    columns = tl.arange(0, BLOCK)
    mask = columns < num_columns
    dtype = x.dtype.element_ty
    value = tl.load(x + row + columns, mask, other=0.0)
    if ADD:
        value = (value.to(tl.float32) + tl.load(residual + row + columns, mask, other=0.0).to(tl.float32)).to(dtype)
        tl.store(residual + row + columns, value, mask)
    wide = value.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / num_columns + eps)
    scale = tl.load(weight + columns, mask, other=0.0).to(tl.float32)
    tl.store(out + row + columns, (wide.to(dtype).to(tl.float32) * scale).to(dtype), mask)


@triton.jit
def _normed(base, weight, places, sum_places, eps, WIDTH: tl.constexpr):
    """A head's values at `places`, normed over the whole head, rounded as torch rounds them."""
    dtype = base.dtype.element_ty
    whole = tl.load(base + sum_places).to(tl.float32)
    scale = tl.rsqrt(tl.sum(whole * whole, axis=0) / WIDTH + eps)
    value = (tl.load(base + places).to(tl.float32) * scale).to(dtype).to(tl.float32)
    return (value * tl.load(weight + places).to(tl.float32)).to(dtype).to(tl.float32)


@triton.jit
def _norm_rope_store_kernel(
    qkv, q_weight, k_weight, cos, sin, kv_slots, k_cache, v_cache, out, eps,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    places = tl.arange(0, WIDTH)
    dtype = qkv.dtype.element_ty
    base = qkv + token * (NUM_HEADS + 2 * NUM_KV_HEADS) * WIDTH + head * WIDTH
    if head >= NUM_HEADS + NUM_KV_HEADS:
        slot = tl.load(kv_slots + token)
        target = v_cache + (slot * NUM_KV_HEADS + head - NUM_HEADS - NUM_KV_HEADS) * WIDTH
        tl.store(target + places, tl.load(base + places))
    else:
        weight = q_weight
        if head >= NUM_HEADS:
            weight = k_weight
        others = (places + WIDTH // 2) % WIDTH
        value = _normed(base, weight, places, places, eps, WIDTH)
        other = _normed(base, weight, others, places, eps, WIDTH)
        other = tl.where(places < WIDTH // 2, -other, other)
        straight = (value * tl.load(cos + token * WIDTH + places).to(tl.float32)).to(dtype).to(tl.float32)
        crossed = (other * tl.load(sin + token * WIDTH + places).to(tl.float32)).to(dtype).to(tl.float32)
        rotated = (straight + crossed).to(dtype)
        if head < NUM_HEADS:
            tl.store(out + (token * NUM_HEADS + head) * WIDTH + places, rotated)
        else:
            slot = tl.load(kv_slots + token)
            tl.store(k_cache + (slot * NUM_KV_HEADS + head - NUM_HEADS) * WIDTH + places, rotated)


class TritonLayerOps:
    """See `LayerOps`. Head widths are powers of two."""

    def rms_norm(self, hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out = torch.empty_like(hidden)
        block = triton.next_power_of_2(hidden.shape[1])
        _rms_norm_kernel[(hidden.shape[0],)](hidden, hidden, weight, out, hidden.shape[1], eps, ADD=False, BLOCK=block)
        return out

    def add_rms_norm(
        self, hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = torch.empty_like(hidden)
        block = triton.next_power_of_2(hidden.shape[1])
        _rms_norm_kernel[(hidden.shape[0],)](hidden, residual, weight, out, hidden.shape[1], eps, ADD=True, BLOCK=block)
        return out, residual

    def norm_rope_store(
        self,
        qkv: torch.Tensor,
        norms: HeadNorms,
        rope: tuple[torch.Tensor, torch.Tensor],
        kv_slots: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
    ) -> torch.Tensor:
        num_tokens, (num_kv_heads, width) = qkv.shape[0], k_cache.shape[1:]
        num_heads = qkv.shape[1] // width - 2 * num_kv_heads
        out = qkv.new_empty(num_tokens, num_heads, width)
        _norm_rope_store_kernel[(num_tokens, num_heads + 2 * num_kv_heads)](
            qkv, norms.query, norms.key, *rope, kv_slots, k_cache, v_cache, out, norms.eps,
            NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, WIDTH=width, num_warps=1,
        )  # fmt: skip
        return out
