"""Attention backends, chosen by name."""

from __future__ import annotations

from typing import Any

from .backend import AttentionBackend, AttentionBatch
from .sdpa import SdpaAttention
from .torch_reference import TorchReferenceAttention

__all__ = ["AttentionBackend", "AttentionBatch", "make_attention_backend"]


def make_attention_backend(name: str) -> AttentionBackend[Any]:
    """ "auto" is the fastest."""
    return TorchReferenceAttention() if name == "torch_reference" else SdpaAttention()
