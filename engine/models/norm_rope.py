"""The small operations between the matrix products of a layer: norms, rotary positions, and keys and values to pages.

Here as their definitions read, in the arithmetic of `transformers`; `norm_rope_triton.py` has each as one kernel, with
the same signature. Rows are independent of each other.

Legend: T tokens, D hidden, H query heads, G kv heads, d head width, r of it that is turned, S slots of the KV pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class HeadNorms:
    """Weights [d] of the per-head query and key norms."""

    query: torch.Tensor
    key: torch.Tensor
    eps: float


class LayerOps(Protocol):
    """The operations of this file, by whichever means."""

    def rms_norm(self, hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Root-mean-square norm (Zhang & Sennrich 2019) over the last dim of [T, D]; the mean is taken in float32, and the
        normed values are rounded to the weight's dtype before they are multiplied by it."""
        ...

    def add_rms_norm(
        self, hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of `hidden + residual`, and that sum; `residual` may be overwritten by it."""
        ...

    def norm_rope_store(
        self,
        qkv: torch.Tensor,
        norms: HeadNorms | None,
        rope: tuple[torch.Tensor, torch.Tensor],
        kv_slots: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
    ) -> torch.Tensor:
        """Norm (where there are `norms`) and rotate queries and keys of `qkv` [T, (H + 2 G) d] by cos and sin [T, 1, r] (Su
        et al. 2021), and write keys and values to the slots [T] of the caches [S, G, d]. Returns the queries [T, H, d]."""
        ...


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first r dims of [T, heads, d], as many as `cos` has; pairs are (i, i + r/2)."""
    width = cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat((rotate(x[..., :width], cos, sin), x[..., width:]), dim=-1)
    half = width // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + rotated * sin


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

    def norm_rope_store(
        self,
        qkv: torch.Tensor,
        norms: HeadNorms | None,
        rope: tuple[torch.Tensor, torch.Tensor],
        kv_slots: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
    ) -> torch.Tensor:
        num_kv_heads, width = k_cache.shape[1:]
        heads = qkv.view(qkv.shape[0], -1, width)
        query, key, value = heads.split([heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
        if norms is not None:
            query, key = self.rms_norm(query, norms.query, norms.eps), self.rms_norm(key, norms.key, norms.eps)
        k_cache.index_copy_(0, kv_slots, rotate(key, *rope))
        v_cache.index_copy_(0, kv_slots, value)
        return rotate(query, *rope)


def select_layer_ops(device: torch.device) -> LayerOps:
    """The fastest for the device."""
    if device.type == "cpu":
        return TorchLayerOps()
    # Triton comes with torch's CUDA builds alone.
    from .norm_rope_triton import TritonLayerOps  # noqa: PLC0415

    return TritonLayerOps()
