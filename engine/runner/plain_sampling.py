"""Sampling over ranks where no request asks for more than a temperature: each chooses among the logits that it holds.

Logits are not gathered and tokens not broadcast: a few numbers a request go round, from which all ranks see the same token.

Legend: B requests, C columns of this rank, n ranks, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...parallel.best_choice import best_choice
from ...parallel.collectives import all_gather
from ...parallel.cpu_ops.log_sum_exp import (
    has_native_log_sum_exp,
    log_of_sums,
    partial_sums_native,
    parts_of_columns,
)
from ...parallel.mesh import Axis
from ..plan import Draw
from .gumbel import ChooseTokens
from .sampler import MIN_LOGPROB, PLACEHOLDER, Sampled


def sample_plain(
    logits: torch.Tensor, first: int, vocab_size: int, draws: Sequence[Draw], axis: Axis, choose: ChooseTokens
) -> Sampled:
    """One token per row, the same on all ranks of the axis.

    Args:
        logits: [B, C], this rank's columns of [B, V], from token `first` on.
    """
    choice = choose(logits, first, draws)
    outcomes = best_choice(choice.scores, choice.token_ids, axis)
    token_ids = outcomes.clamp(min=PLACEHOLDER)
    if not any(draw.with_logprob for draw in draws):
        return Sampled(token_ids, outcomes)
    logprobs = logprobs_of(logits, first, vocab_size, token_ids, axis)
    return Sampled(token_ids, outcomes, logprobs, [None] * len(draws))


def logprobs_of(logits: torch.Tensor, first: int, vocab_size: int, token_ids: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Log-probabilities [B] of tokens [B] by the model's own distribution."""
    wide = logits.float()
    columns = token_ids - first
    here = (columns >= 0) & (columns < logits.shape[1])
    taken = wide.gather(1, columns.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
    is_native = has_native_log_sum_exp(logits)
    num_parts = parts_of_columns(vocab_size, axis.size)
    sums = partial_sums_native(wide, num_parts) if is_native else wide.logsumexp(dim=-1)[None]
    of_all = all_gather(torch.cat([torch.where(here, taken, -torch.inf)[None], sums])[None], axis)
    total = log_of_sums(of_all[:, 1:]) if is_native else of_all[:, 1:].flatten(0, 1).logsumexp(dim=0)
    return (of_all[:, 0].amax(dim=0) - total).clamp(min=MIN_LOGPROB)
