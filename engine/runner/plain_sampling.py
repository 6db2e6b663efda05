"""Sampling over ranks where no request asks for more than a temperature: each chooses among the logits that it holds.

Logits are not gathered and tokens not broadcast: a few numbers a request go round, from which all ranks see the same token.

Legend: B requests, C columns of this rank, n ranks, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...parallel.collectives import all_gather
from ...parallel.mesh import Axis
from ..plan import Draw
from .gumbel import ChooseTokens, TokenChoice
from .sampler import MIN_LOGPROB, NO_TOKEN, PLACEHOLDER, Sampled

# More than any.
MAX_ID = 2**31 - 1


def sample_plain(logits: torch.Tensor, first: int, draws: Sequence[Draw], axis: Axis, choose: ChooseTokens) -> Sampled:
    """One token per row, the same on all ranks of the axis.

    Args:
        logits: [B, C], this rank's columns of [B, V], from token `first` on.
    """
    choice = best_of_ranks(choose(logits, first, draws), axis)
    outcomes = torch.where(choice.scores.abs() < torch.inf, choice.token_ids, NO_TOKEN)
    token_ids = outcomes.clamp(min=PLACEHOLDER)
    if not any(draw.with_logprob for draw in draws):
        return Sampled(token_ids, outcomes)
    logprobs = logprobs_of(logits, first, token_ids, axis)
    return Sampled(token_ids, outcomes, logprobs, [None] * len(draws))


def best_of_ranks(choice: TokenChoice, axis: Axis) -> TokenChoice:
    """Of equal scores the lowest id; a score is NaN where any rank's is."""
    if axis.size == 1:
        return choice
    # float64 holds any id.
    best = all_gather(torch.stack([choice.scores.double(), choice.token_ids.double()])[None], axis)
    scores = best[:, 0].amax(dim=0)
    ids = torch.where(best[:, 0] == scores, best[:, 1], float(MAX_ID)).amin(dim=0)
    return TokenChoice(scores, ids.to(torch.int64))


def logprobs_of(logits: torch.Tensor, first: int, token_ids: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Log-probabilities [B] of tokens [B] by the model's own distribution."""
    wide = logits.float()
    columns = token_ids - first
    here = (columns >= 0) & (columns < logits.shape[1])
    taken = wide.gather(1, columns.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
    parts = torch.stack([torch.where(here, taken, -torch.inf), wide.logsumexp(dim=-1)])
    of_all = all_gather(parts[None], axis)
    return (of_all[:, 0].amax(dim=0) - of_all[:, 1].logsumexp(dim=0)).clamp(min=MIN_LOGPROB)
