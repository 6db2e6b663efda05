"""One Triton kernel per operation of `norm_rope.py`, with the roundings of its torch twin."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...parallel.triton_launch import Kernel, ceil_div, launch_options, power_of_2_from, start_next, wait_for_previous
from .latent_rope_triton import latent_rope_store_triton
from .norm_rope import HeadNorms, KVTarget, LatentNorm, Rope
from .swiglu_triton import swiglu_triton

# Heads that one program turns.
HEADS = 8


@Kernel
@triton.jit
def _rms_norm_kernel(
    x, residual, weight, out, num_columns, x_stride, eps, ADD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    start_next(PDL)
    row = tl.program_id(0).to(tl.int64) * num_columns
    x_row = tl.program_id(0).to(tl.int64) * x_stride
    columns = tl.arange(0, BLOCK)
    mask = columns < num_columns
    dtype = x.dtype.element_ty
    scale = tl.load(weight + columns, mask, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    value = tl.load(x + x_row + columns, mask, other=0.0)
    if ADD:
        value = (value.to(tl.float32) + tl.load(residual + row + columns, mask, other=0.0).to(tl.float32)).to(dtype)
        tl.store(residual + row + columns, value, mask)
    wide = value.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / num_columns + eps)
    wide = wide.to(weight.dtype.element_ty).to(tl.float32)
    tl.store(out + row + columns, (wide * scale).to(dtype), mask)


@Kernel
@triton.jit
def _norm_rope_store_kernel(
    qkv, q_weight, k_weight, cos, sin, kv_slots, k_cache, v_cache, out, eps, NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, TURNED: tl.constexpr, HEADS: tl.constexpr, NORM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A block of one token's heads, query, key and value heads side by side; value heads are stored as they are."""
    start_next(PDL)
    wait_for_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    heads = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    columns = tl.arange(0, WIDTH)[None, :]
    turns = columns < TURNED
    others = tl.where(turns, (columns + TURNED // 2) % TURNED, columns)
    dtype = qkv.dtype.element_ty
    inside = heads < NUM_HEADS + 2 * NUM_KV_HEADS
    is_query = heads < NUM_HEADS
    is_key = (heads >= NUM_HEADS) & (heads < NUM_HEADS + NUM_KV_HEADS)
    is_value = (heads >= NUM_HEADS + NUM_KV_HEADS) & inside
    base = qkv + token * (NUM_HEADS + 2 * NUM_KV_HEADS) * WIDTH + heads * WIDTH
    raw = tl.load(base + columns, inside, other=0.0)
    value = raw.to(tl.float32)
    other = tl.load(base + others, inside, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(value * value, axis=1) / WIDTH + eps)[:, None]
        weight = tl.where(is_query, tl.load(q_weight + columns), tl.load(k_weight + columns)).to(tl.float32)
        value = ((value * scale).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)
        weight = tl.where(is_query, tl.load(q_weight + others), tl.load(k_weight + others)).to(tl.float32)
        other = ((other * scale).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)
    other = tl.where(columns < TURNED // 2, -other, other)
    straight = value * tl.load(cos + token * TURNED + columns, turns, other=1.0).to(tl.float32)
    crossed = other * tl.load(sin + token * TURNED + columns, turns, other=0.0).to(tl.float32)
    rotated = (straight.to(dtype).to(tl.float32) + crossed.to(dtype).to(tl.float32)).to(dtype)
    rotated = tl.where(turns, rotated, value.to(dtype))
    tl.store(out + (token * NUM_HEADS + heads) * WIDTH + columns, rotated, is_query)
    slot = tl.load(kv_slots + token) * NUM_KV_HEADS
    tl.store(k_cache + (slot + heads - NUM_HEADS) * WIDTH + columns, rotated, is_key)
    tl.store(v_cache + (slot + heads - NUM_HEADS - NUM_KV_HEADS) * WIDTH + columns, raw, is_value)


class TritonLayerOps:
    """See `LayerOps`. Head widths are powers of two; `load_model` checks that."""

    def rms_norm(self, hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out = hidden.new_empty(hidden.shape)
        self._rms_norm(hidden, hidden, weight, out, eps, add=False)
        return out

    @staticmethod
    def _rms_norm(
        hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, eps: float, *, add: bool
    ) -> None:
        num_rows, num_columns = hidden.shape
        _rms_norm_kernel[(num_rows,)](
            hidden, residual, weight, out, num_columns, hidden.stride(0), eps, ADD=add,
            BLOCK=power_of_2_from(num_columns), **launch_options(hidden.device),
        )  # fmt: skip

    def add_rms_norm(
        self, hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = torch.empty_like(hidden)
        self._rms_norm(hidden, residual, weight, out, eps, add=True)
        return out, residual

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        return swiglu_triton(gate_up)

    def norm_rope_store(self, qkv: torch.Tensor, norms: HeadNorms | None, rope: Rope, target: KVTarget) -> torch.Tensor:
        kv_slots, k_cache, v_cache = target
        num_tokens, (num_kv_heads, width) = qkv.shape[0], k_cache.shape[1:]
        num_heads = qkv.shape[1] // width - 2 * num_kv_heads
        out = qkv.new_empty(num_tokens, num_heads, width)
        weights = (qkv, qkv) if norms is None else (norms.query, norms.key)
        _norm_rope_store_kernel[(num_tokens, ceil_div(num_heads + 2 * num_kv_heads, HEADS))](
            qkv, *weights, *rope, kv_slots, k_cache, v_cache, out, 0.0 if norms is None else norms.eps,
            NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, WIDTH=width, TURNED=rope[0].shape[-1], HEADS=HEADS,
            NORM=norms is not None,
            num_warps=4, **launch_options(qkv.device),
        )  # fmt: skip
        return out

    def latent_rope_store(
        self,
        query: torch.Tensor,
        compressed: torch.Tensor,
        norm: LatentNorm,
        rope: Rope,
        kv_slots: torch.Tensor,
        cache: torch.Tensor,
    ) -> torch.Tensor:
        return latent_rope_store_triton(query, compressed, norm, rope, kv_slots, cache)
