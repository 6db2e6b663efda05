"""The best of the candidates that the ranks of an axis have for each row: all of them see the same one.

Here as its definition reads; `best_choice_triton.py` has it as one kernel, the ranks' exchange included.

Legend: B rows, M candidates of a row on this rank.
"""

from __future__ import annotations

import torch

from .collectives import all_gather
from .mesh import Axis

# In place of an id where there is nothing to choose.
NO_CHOICE = -1
# More than any.
MAX_ID = 2**31 - 1


def best_choice(scores: torch.Tensor, ids: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The id [B] int64 of each row's best score, of equal ones the lowest id: by scores [B, M] float32 and ids [B, M] int64
    of every rank. `NO_CHOICE` where a score is NaN or the best one infinite."""
    if scores.device.type == "cpu":
        return best_choice_torch(scores, ids, axis)
    lane = None if axis.symmetric is None else axis.symmetric.lane_of_choices(len(scores))
    if axis.size > 1 and lane is None:
        return best_choice_torch(scores, ids, axis)
    # Triton comes with torch's CUDA builds alone.
    from .best_choice_triton import best_choice_triton  # noqa: PLC0415

    return best_choice_triton(scores, ids, lane)


def best_choice_torch(scores: torch.Tensor, ids: torch.Tensor, axis: Axis) -> torch.Tensor:
    """See `best_choice`, with one collective."""
    best, chosen = _best_candidate(scores.double(), ids.double())
    if axis.size > 1:
        # float64 holds any id, and NaN goes through its maximum.
        of_ranks = all_gather(torch.stack([best, chosen])[None], axis)
        best, chosen = _best_candidate(of_ranks[:, 0].t(), of_ranks[:, 1].t())
    return torch.where(best.abs() < torch.inf, chosen, NO_CHOICE).to(torch.int64)


def _best_candidate(scores: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    best = scores.amax(dim=1)
    return best, torch.where(scores == best[:, None], ids, float(MAX_ID)).amin(dim=1)
