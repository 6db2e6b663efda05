"""Rows of one pool into another, by their slots: heads `theirs` of a slot there become heads `ours` of one here."""

from __future__ import annotations

from collections.abc import Callable

import torch

Heads = tuple[int, int] | None
# (source, target, slots there [n] int64, slots here [n] int64): `target[:, here] = source[:, there]`, both as words.
CopyRows = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


def select_heads(stack: torch.Tensor, heads: Heads) -> torch.Tensor:
    """Of [layers, slots, heads, width] or, where there are none, [layers, slots, width]."""
    return stack if heads is None or stack.dim() == 3 else stack[:, :, heads[0] : heads[1]]


def as_words(source: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same memory as [layers, slots, n]: in words of eight bytes if the rows of both have whole ones, as they are
    otherwise."""
    rows, others = (stack.view(*stack.shape[:2], -1) for stack in (source, target))
    try:
        return rows.view(torch.int64), others.view(torch.int64)
    except RuntimeError:
        return rows, others


def copy_rows_torch(source: torch.Tensor, target: torch.Tensor, there: torch.Tensor, here: torch.Tensor) -> None:
    target[:, here] = source[:, there]


def select_copy_rows(device: torch.device) -> CopyRows:
    """The fastest for the device."""
    if device.type == "cpu":
        return copy_rows_torch
    # Triton comes with torch's CUDA builds alone.
    from .row_copy_triton import copy_rows_triton  # noqa: PLC0415

    return copy_rows_triton
