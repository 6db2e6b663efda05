"""The small operations between the matrix products of a layer: norms, activations, rotary positions, keys and values to
pages.

Here as their definitions read, in the arithmetic of `transformers`; `norm_rope_triton.py` has each as one kernel, with
the same signature. Rows are independent of each other.

Legend: T tokens, D hidden, I width of an MLP, H query heads, G kv heads, d head width, r of it that is turned, S slots of
the KV pool; of latents: L width of a latent, R width of the rotated key that all heads share, N width of a head's other key
columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from ...parallel.cpu_ops.activation import swiglu_native
from ...parallel.cpu_ops.norm_rope import norm_rope_store_native
from ...parallel.cpu_ops.rms_norm import add_rms_norm_native, has_native_rms_norm, rms_norm_native

# Of norms in C++.
NORM_WEIGHTS = (torch.bfloat16, torch.float32)
# cos and sin.
Rope = tuple[torch.Tensor, torch.Tensor]


class KVTarget(NamedTuple):
    """Where new keys and values go: slots [T] of the caches [S, G, d]."""

    kv_slots: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor


@dataclass(frozen=True)
class HeadNorms:
    """Weights [d] of the per-head query and key norms."""

    query: torch.Tensor
    key: torch.Tensor
    eps: float


@dataclass(frozen=True)
class LatentNorm:
    """Weight [L] of the norm of latents, and whether the pairs that are rotated stand side by side."""

    weight: torch.Tensor
    eps: float
    is_interleaved: bool


class LayerOps(Protocol):
    """The operations of this file, by whichever means."""

    def rms_norm(self, hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Root-mean-square norm (Zhang & Sennrich 2019) over the last dim of [T, D]; the mean is taken in float32, and the
        normed values are rounded to the weight's dtype before they are multiplied by it. Rows may be further apart than
        they are long."""
        ...

    def add_rms_norm(
        self, hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of `hidden + residual`, and that sum; `residual` may be overwritten by it."""
        ...

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Gates and what they weigh, side by side [T, 2 I] -> silu(gate) * up (Shazeer 2020), [T, I]."""
        ...

    def norm_rope_store(self, qkv: torch.Tensor, norms: HeadNorms | None, rope: Rope, target: KVTarget) -> torch.Tensor:
        """Norm (where there are `norms`) and rotate queries and keys of `qkv` [T, (H + 2 G) d] by cos and sin [T, 1, r] (Su
        et al. 2021), and write keys and values where they belong. Returns the queries [T, H, d]."""
        ...

    def latent_rope_store(
        self,
        query: torch.Tensor,
        compressed: torch.Tensor,
        norm: LatentNorm,
        rope: Rope,
        kv_slots: torch.Tensor,
        cache: torch.Tensor,
    ) -> torch.Tensor:
        """Norm the latents of `compressed` [T, L + R], rotate the keys behind them by cos and sin [T, 1, R], and write both
        to the slots [T] of the cache [S, L + R]. Returns the queries [T, H, N + R], their last R columns rotated. Rows of
        `compressed` may be further apart than they are long."""
        ...


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first r dims of [T, heads, d], as many as `cos` has; pairs are (i, i + r/2)."""
    width = cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat((rotate(x[..., :width], cos, sin), x[..., width:]), dim=-1)
    half = width // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + rotated * sin


def rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, is_interleaved: bool) -> torch.Tensor:
    """Rotate [T, heads, R] whose pairs are (2 i, 2 i + 1), or (i, i + R/2); they come out as the latter."""
    half = x.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]
    first, second = (x[..., 0::2], x[..., 1::2]) if is_interleaved else (x[..., :half], x[..., half:])
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class TorchLayerOps:
    """The operations as their definitions read."""

    def rms_norm(self, hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return (weight * wide.to(weight.dtype)).to(hidden.dtype)

    def add_rms_norm(
        self, hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = residual + hidden
        return self.rms_norm(total, weight, eps), total

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def norm_rope_store(self, qkv: torch.Tensor, norms: HeadNorms | None, rope: Rope, target: KVTarget) -> torch.Tensor:
        kv_slots, k_cache, v_cache = target
        num_kv_heads, width = k_cache.shape[1:]
        heads = qkv.view(qkv.shape[0], -1, width)
        query, key, value = heads.split([heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
        if norms is not None:
            query, key = self.rms_norm(query, norms.query, norms.eps), self.rms_norm(key, norms.key, norms.eps)
        k_cache.index_copy_(0, kv_slots, rotate(key, *rope))
        v_cache.index_copy_(0, kv_slots, value)
        return rotate(query, *rope)

    def latent_rope_store(
        self,
        query: torch.Tensor,
        compressed: torch.Tensor,
        norm: LatentNorm,
        rope: Rope,
        kv_slots: torch.Tensor,
        cache: torch.Tensor,
    ) -> torch.Tensor:
        width = rope[0].shape[-1]
        latent, key = compressed.tensor_split([-width], dim=-1)
        key = rotate_pairs(key[:, None], *rope, is_interleaved=norm.is_interleaved)[:, 0]
        cache.index_copy_(0, kv_slots, torch.cat((self.rms_norm(latent, norm.weight, norm.eps), key), dim=-1))
        content, turned = query.tensor_split([-width], dim=-1)
        return torch.cat((content, rotate_pairs(turned, *rope, is_interleaved=norm.is_interleaved)), dim=-1)


class NativeLayerOps(TorchLayerOps):
    """Norms, SwiGLU, rotary positions and stores in C++, of what is in bfloat16."""

    def rms_norm(self, hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if hidden.dtype == torch.bfloat16 and weight.dtype in NORM_WEIGHTS:
            return rms_norm_native(hidden, weight, eps)
        return super().rms_norm(hidden, weight, eps)

    def add_rms_norm(
        self, hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if hidden.dtype == residual.dtype == torch.bfloat16 and weight.dtype in NORM_WEIGHTS:
            return add_rms_norm_native(hidden, residual, weight, eps)
        return super().add_rms_norm(hidden, residual, weight, eps)

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        return swiglu_native(gate_up) if gate_up.dtype == torch.bfloat16 else super().swiglu(gate_up)

    def norm_rope_store(self, qkv: torch.Tensor, norms: HeadNorms | None, rope: Rope, target: KVTarget) -> torch.Tensor:
        weights = None if norms is None else (norms.query, norms.key)
        if any(x.dtype != torch.bfloat16 for x in (qkv, target.k_cache, *rope, *(weights or ()))):
            return super().norm_rope_store(qkv, norms, rope, target)
        eps = 0.0 if norms is None else norms.eps
        return norm_rope_store_native(qkv, weights, eps, rope, target.kv_slots, (target.k_cache, target.v_cache))


def select_layer_ops(device: torch.device) -> LayerOps:
    """The fastest for the device."""
    if device.type == "cpu":
        return NativeLayerOps() if has_native_rms_norm() else TorchLayerOps()
    # Triton comes with torch's CUDA builds alone.
    from .norm_rope_triton import TritonLayerOps  # noqa: PLC0415

    return TritonLayerOps()
