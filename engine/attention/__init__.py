"""Attention backends, chosen by name."""

from __future__ import annotations

from typing import Any

import torch

from .backend import AttentionBackend, AttentionBatch, AttentionRule, CachedTensors, GraphAttentionBackend
from .sdpa import SdpaAttention
from .torch_reference import TorchReferenceAttention

__all__ = [
    "AttentionBackend",
    "AttentionBatch",
    "AttentionRule",
    "CachedTensors",
    "GraphAttentionBackend",
    "make_attention_backend",
]


def make_attention_backend(name: str, device: torch.device) -> AttentionBackend[Any]:
    """ "auto" is the fastest for the device."""
    if name == "torch_reference":
        return TorchReferenceAttention()
    if name == "sdpa" or device.type == "cpu":
        return SdpaAttention()
    # Triton comes with torch's CUDA builds alone.
    from .triton_paged import TritonPagedAttention  # noqa: PLC0415

    return TritonPagedAttention()
