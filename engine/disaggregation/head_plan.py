"""Which rank of a prefill has the keys and values that a rank of a decode needs. Pure.

Heads are spread over tp ranks in order; with more ranks than heads each is held by several neighbouring ranks. A latent has
no heads: every rank has the whole of it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadSlice:
    """Heads `theirs` of a prefill's tp `rank` are heads `ours` here, both `[first, end)` as the rank counts them; None:
    whatever a position has."""

    rank: int
    theirs: tuple[int, int] | None
    ours: tuple[int, int] | None


def heads_of(num_heads: int, tp_size: int, rank: int) -> tuple[int, int]:
    """`[first, end)` of the kv heads that a tp rank holds."""
    if num_heads >= tp_size:
        each = num_heads // tp_size
        return rank * each, (rank + 1) * each
    head = rank // (tp_size // num_heads)
    return head, head + 1


def head_slices(num_heads: int, prefill_tp: int, decode_tp: int, rank: int) -> list[HeadSlice]:
    """Where tp rank `rank` of a decode finds what it holds, in order of heads. Tp rank 0 asks tp rank 0.

    Args:
        num_heads: kv heads of the model; 0 where there are latents.
    """
    if num_heads == 0:
        return [HeadSlice(rank % prefill_tp, None, None)]
    first, end = heads_of(num_heads, decode_tp, rank)
    if num_heads < prefill_tp:
        copies = prefill_tp // num_heads
        return [
            HeadSlice(head * copies + rank % copies, (0, 1), (head - first, head - first + 1))
            for head in range(first, end)
        ]
    slices = []
    for other in range(prefill_tp):
        low, high = heads_of(num_heads, prefill_tp, other)
        start, stop = max(first, low), min(end, high)
        if start < stop:
            slices.append(HeadSlice(other, (start - low, stop - low), (start - first, stop - first)))
    return slices
