"""Rows of one pool into another, by their slots: heads `theirs` of a slot there become heads `ours` of one here."""

from __future__ import annotations

from collections.abc import Callable

import torch

Heads = tuple[int, int] | None
# (source, target, slots there [n] int64, slots here [n] int64): `target[:, here] = source[:, there]`.
CopyRows = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
WORD_BYTES = 8


def select_heads(stack: torch.Tensor, heads: Heads) -> torch.Tensor:
    """Of [layers, slots, heads, width] or, where there are none, [layers, slots, width]."""
    return stack if heads is None or stack.dim() == 3 else stack[:, :, heads[0] : heads[1]]


def copy_rows_torch(source: torch.Tensor, target: torch.Tensor, there: torch.Tensor, here: torch.Tensor) -> None:
    target[:, here] = source[:, there]


def as_words(stack: torch.Tensor) -> torch.Tensor | None:
    """The same memory as [layers, slots, words] int64; None where rows are no whole words."""
    num_layers, num_slots = stack.shape[:2]
    row_bytes = stack[0, 0].numel() * stack.itemsize
    strides = (stack.stride(0) * stack.itemsize, stack.stride(1) * stack.itemsize)
    offset = stack.storage_offset() * stack.itemsize
    if any(size % WORD_BYTES for size in (row_bytes, offset, *strides)):
        return None
    assert stack[0, 0].is_contiguous(), "neighbouring heads lie beside each other"
    whole = torch.empty(0, dtype=torch.int64, device=stack.device)
    shape = (num_layers, num_slots, row_bytes // WORD_BYTES)
    words = (*(stride // WORD_BYTES for stride in strides), 1)
    return whole.set_(stack.untyped_storage(), offset // WORD_BYTES, shape, words)


def select_copy_rows(device: torch.device) -> CopyRows:
    """The fastest for the device."""
    if device.type == "cpu":
        return copy_rows_torch
    # Triton comes with torch's CUDA builds alone.
    from .row_copy_triton import copy_rows_triton  # noqa: PLC0415

    return copy_rows_triton
