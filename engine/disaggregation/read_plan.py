"""Which bytes of another rank's pool are read for some positions, in as few pieces as its layout allows, and where they go
in a memory of this rank. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..kv_cache.kv_store import ALIGNMENT, StackPlace
from .page_copy import Heads

# What a piece costs beside its bytes, in bytes that go over the link in the same time.
PIECE_BYTES = 16 << 10


@dataclass(frozen=True)
class ReadPlan:
    """`num_bytes[i]` bytes from `theirs[i]` on, in the other pool, go to `ours[i]`, int64 [pieces] each. `parts` are then
    in our memory, in order of positions; `heads` of them were asked for, None: all that they have."""

    theirs: np.ndarray
    ours: np.ndarray
    num_bytes: np.ndarray
    parts: list[StackPlace]
    heads: Heads


def row_bytes(stack: StackPlace, num_heads: int | None = None) -> int:
    """Of one slot in one layer; of so many of its heads, if it has any."""
    if num_heads is None or len(stack.shape) == 3:
        return math.prod(stack.shape[2:]) * stack.dtype.itemsize
    return num_heads * stack.shape[-1] * stack.dtype.itemsize


def room_for(stacks: Sequence[StackPlace], block_bytes: int) -> int:
    """Bytes that any plan of such a block, or of one position, takes in our memory."""
    position = sum(stack.shape[0] * row_bytes(stack) for stack in stacks)
    return max(block_bytes, position) + ALIGNMENT * len(stacks)


def plan_reads(stacks: Sequence[StackPlace], slots: np.ndarray, heads: Heads) -> ReadPlan:
    """
    Args:
        stacks: where the other pool has its tensors.
        slots: KV slots there, in order of positions, [n] int64, n > 0.
        heads: those of the other rank that are wanted; None: whatever a position has.
    """
    num_heads = None if heads is None else heads[1] - heads[0]
    begins = np.flatnonzero(np.diff(slots, prepend=slots[0] - 2) != 1)
    if num_heads is not None and _is_whole_cheaper(stacks, len(slots), len(begins), num_heads):
        num_heads = None
    pieces: list[np.ndarray] = []
    parts: list[StackPlace] = []
    end = 0
    for stack in stacks:
        theirs_row, ours_row = row_bytes(stack), row_bytes(stack, num_heads)
        # Rows that lie beside each other are one piece, if all of each is wanted.
        first = begins if theirs_row == ours_row else np.arange(len(slots))
        skipped = 0 if heads is None or theirs_row == ours_row else row_bytes(stack, heads[0])
        layers = np.arange(stack.shape[0])[:, None]
        theirs = stack.offset + (layers * stack.shape[1] + slots[first]) * theirs_row + skipped
        ours = end + (layers * len(slots) + first) * ours_row
        sizes = np.broadcast_to(np.diff(first, append=len(slots)) * ours_row, theirs.shape)
        pieces.append(np.stack([theirs, ours, sizes]).reshape(3, -1))
        width = stack.shape[2:] if theirs_row == ours_row else (num_heads or 0, stack.shape[-1])
        parts.append(StackPlace(end, (stack.shape[0], len(slots), *width), stack.dtype))
        end += -(-parts[-1].num_bytes // ALIGNMENT) * ALIGNMENT
    theirs, ours, sizes = np.concatenate(pieces, axis=1)
    return ReadPlan(theirs, ours, sizes, parts, heads if num_heads is None else None)


def _is_whole_cheaper(stacks: Sequence[StackPlace], num_slots: int, num_runs: int, num_heads: int) -> bool:
    """Whether rows are read with all of their heads, a run of them at once, in place of a piece for each row."""
    whole = part = 0
    for stack in stacks:
        whole += stack.shape[0] * (num_runs * PIECE_BYTES + num_slots * row_bytes(stack))
        part += stack.shape[0] * num_slots * (PIECE_BYTES + row_bytes(stack, num_heads))
    return whole <= part
