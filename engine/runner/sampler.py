"""From logits to tokens: penalties, bias, temperature, top-k, top-p, min-p, and log-probabilities.

Every random choice is a function of the request's seed and the output position alone: a request samples the same tokens
whatever else is in its batch, and again after a retraction. Without filters it is made by the Gumbel-max trick
(`gumbel.py`), as ranks make it that sample without this file (`plain_sampling.py`).

A row that leaves no choice - NaN or infinity among its scores, or every token banned - is found on the device, costs
nobody else a bit, and gets a placeholder: the next step, which is launched before the host knows, reads a valid id.

Legend: B requests of a step that sample, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ...parallel.best_choice import NO_CHOICE, best_choice
from ...parallel.cpu_ops.log_sum_exp import (
    has_native_log_sum_exp,
    log_of_sums,
    partial_sums_native,
    parts_of_columns,
)
from ...parallel.host_to_device import to_device
from ...parallel.mesh import Axis
from ..grammar.constraint import Constraint, Mask
from ..io_struct import OutputOptions, SamplingParams
from ..plan import Draw, PromptScores
from .gumbel import select_choose_tokens

# In place of the token of a row that leaves no choice, for the host; the device goes on with the placeholder.
NO_TOKEN = NO_CHOICE
PLACEHOLDER = 0
# What is less likely has this log-probability: JSON holds no infinity, and exp(-9999) is 0 in every format.
MIN_LOGPROB = -9999.0


@dataclass
class SamplingRow:
    """What the sampler needs to know of one request. `counts` belong to it while it runs, on the logits' device."""

    params: SamplingParams
    options: OutputOptions
    # Tokens that end the request; not sampled before `min_new_tokens` are out.
    stop_ids: tuple[int, ...]
    # Index of the token to sample, counted from the first output token.
    position: int = 0
    # How often each token stands in the output, and whether it stands in prompt or output: [V] float32 / bool.
    output_counts: torch.Tensor | None = None
    seen: torch.Tensor | None = None
    # What its output must follow.
    constraint: Constraint | None = None


@dataclass(frozen=True)
class Sampled:
    """Sampled ids [B] int64 and, for rows that asked, log-probabilities; still on the device.

    `token_ids` are the next step's input, `outcomes` the same with `NO_TOKEN` where a row leaves no choice; the
    log-probabilities of such a row mean nothing.
    """

    token_ids: torch.Tensor
    outcomes: torch.Tensor
    logprobs: torch.Tensor | None = None  # [B] float32
    top: list[tuple[torch.Tensor, torch.Tensor] | None] = field(default_factory=list)  # per row: values, ids


def start_counts(
    row: SamplingRow, token_ids: np.ndarray, num_prompt: int, vocab_size: int, device: torch.device
) -> None:
    """Count prompt and output tokens known so far, for requests with penalties only."""
    if not row.params.has_penalties:
        return
    ids = torch.from_numpy(token_ids.astype(np.int64)).to(device)
    row.output_counts = torch.bincount(ids[num_prompt:], minlength=vocab_size).to(torch.float32)
    row.seen = torch.bincount(ids, minlength=vocab_size) > 0


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but `seed` and `position` (counter-based, Salmon et al. 2011)."""
    raw = int(np.random.Philox(key=seed & (2**64 - 1), counter=position).random_raw())
    return (raw >> 11) * 2.0**-53


def sample(logits: torch.Tensor, rows: Sequence[SamplingRow], masks: Sequence[Mask | None] | None = None) -> Sampled:
    """Choose one token per row.

    Args:
        logits: [B, V], any float dtype; not modified.
        rows: B requests.
        masks: the tokens that each may choose, before anything else is looked at; None is any.
    """
    assert logits.shape[0] == len(rows)
    scores = logits.float() if masks is None else allow(logits.float(), masks)
    adjusted = _adjust(scores, rows)
    filtered = [i for i, row in enumerate(rows) if row.params.is_filtered]
    if len(filtered) == len(rows):
        outcomes = _draw_filtered(adjusted, rows)
    else:
        choice = select_choose_tokens(logits.device)(adjusted, 0, [_draw_of(row) for row in rows])
        outcomes = best_choice(choice.scores, choice.token_ids, Axis.single())
        if filtered:
            where = to_device(filtered, logits.device)
            outcomes[where] = _draw_filtered(adjusted[where], [rows[i] for i in filtered])
    token_ids = outcomes.clamp(min=PLACEHOLDER)
    for i, row in enumerate(rows):
        if row.output_counts is not None and row.seen is not None:
            row.output_counts.index_add_(0, token_ids[i : i + 1], row.output_counts.new_ones(1))
            row.seen.index_fill_(0, token_ids[i : i + 1], True)
    return _with_logprobs(scores, token_ids, outcomes, rows, is_native=has_native_log_sum_exp(logits))


def allow(scores: torch.Tensor, masks: Sequence[Mask | None]) -> torch.Tensor:
    """Scores [B, V] of allowed tokens; those of others are minus infinity, or NaN where they are no finite numbers."""
    if all(mask is None for mask in masks):
        return scores
    vocab_size = scores.shape[1]
    words = np.zeros((len(masks), (vocab_size + 31) // 32), dtype=np.int32)
    for line, mask in zip(words, masks, strict=True):
        if mask is None:
            line[:] = -1
        else:
            line[: len(mask)] = mask[: len(line)]
    packed = torch.from_numpy(words.view(np.uint8))
    if scores.device.type != "cpu":
        packed = packed.pin_memory().to(scores.device, non_blocking=True)
    bits = (packed[:, :, None] >> torch.arange(8, device=scores.device, dtype=torch.uint8)) & 1
    # Added, not filled in: NaN stays NaN.
    return scores + torch.where(bits.flatten(1)[:, :vocab_size] > 0, 0.0, -torch.inf)


def _adjust(scores: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Penalties, bias, what is allowed and the ban on early stops: scores [B, V], copied when anything changes.

    Nothing here turns NaN or an infinite score into a finite one.
    """
    adjusted = scores
    for i, row in enumerate(rows):
        params = row.params
        # A grammar that has ended leaves no other choice.
        may_end = row.position >= params.min_new_tokens or (row.constraint is not None and row.constraint.has_ended)
        banned = () if may_end else row.stop_ids
        if row.output_counts is None and not params.logit_bias and not params.allowed_token_ids and not banned:
            continue
        if adjusted is scores:
            adjusted = scores.clone()
        line = adjusted[i]
        if row.output_counts is not None and row.seen is not None:
            penalty = params.repetition_penalty
            if penalty != 1.0:
                # Keskar et al. 2019 (CTRL): shrink towards unlikely whatever the sign.
                line.copy_(torch.where(row.seen, torch.where(line > 0, line / penalty, line * penalty), line))
            line -= params.frequency_penalty * row.output_counts
            line -= params.presence_penalty * (row.output_counts > 0)
        if params.logit_bias:
            ids = to_device(list(params.logit_bias), line.device)
            line[ids] += to_device(list(params.logit_bias.values()), line.device)
        if params.allowed_token_ids:
            others = torch.full_like(line, -torch.inf)
            others[to_device(list(params.allowed_token_ids), line.device)] = 0.0
            line += others
        if banned:
            # Added, not filled in: NaN stays NaN.
            line[to_device(banned, line.device)] += -torch.inf
    return adjusted


def _draw_of(row: SamplingRow) -> Draw:
    """Of a row without filters; of another one its best token will do."""
    is_random = not row.params.is_greedy and not row.params.is_filtered
    return Draw(row.params.temperature if is_random else 0.0, row.params.sampling_seed, row.position)


def _draw_filtered(scores: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Sample by inverting the cumulative distribution after temperature and filters: [B', V] -> outcomes [B'] int64."""
    device = scores.device
    temperatures = to_device([row.params.temperature for row in rows], device)
    probs = torch.softmax(scores / temperatures[:, None], dim=-1)
    points = to_device([uniform(row.params.sampling_seed, row.position) for row in rows], device, torch.float64)
    ordered, order = probs.sort(dim=-1, descending=True)
    picked = _invert(_filter(ordered, rows), points)
    token_ids = order.gather(1, picked[:, None]).squeeze(1)
    # A row whose sum is no number is NaN as a whole: any of its probabilities tells.
    return torch.where(probs[:, 0] >= 0, token_ids, NO_TOKEN)


def _filter(ordered: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Zero what top-k, top-p (Holtzman et al. 2020) and min-p (Nguyen et al. 2024) cut off, each measured on the
    distribution that temperature alone gives: `ordered` [B', V], probabilities in descending order."""
    device = ordered.device
    vocab_size = ordered.shape[1]
    top_k = to_device([row.params.top_k if row.params.top_k > 0 else vocab_size for row in rows], device)
    top_p = to_device([row.params.top_p for row in rows], device)
    min_p = to_device([row.params.min_p for row in rows], device)
    ranks = torch.arange(vocab_size, device=device)
    keep = ranks[None, :] < top_k[:, None]
    # A token stays while the mass before it is below top_p; so the most likely one always stays.
    keep &= (ordered.cumsum(dim=-1) - ordered) < top_p[:, None]
    keep &= ordered >= min_p[:, None] * ordered[:, :1]
    keep[:, 0] = True
    return ordered * keep


def _invert(weights: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """The first index whose cumulative weight exceeds the point's share of the total; never one of zero weight. Any index
    of the row where the weights are NaN."""
    cumulative = weights.double().cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Rounding may lift the product to the total itself, which no index exceeds.
    targets = torch.minimum(points[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, targets, right=True).squeeze(1).clamp(max=weights.shape[1] - 1)


def _with_logprobs(
    scores: torch.Tensor,
    token_ids: torch.Tensor,
    outcomes: torch.Tensor,
    rows: Sequence[SamplingRow],
    *,
    is_native: bool,
) -> Sampled:
    """Log-probabilities of the model's own distribution, over the tokens that a grammar allows: before bias, penalties,
    temperature and filters."""
    asking = [i for i, row in enumerate(rows) if row.options.return_logprob]
    if not asking:
        return Sampled(token_ids, outcomes)
    where = to_device(asking, scores.device)
    logprobs = _log_softmax(scores[where], is_native=is_native).clamp_(min=MIN_LOGPROB)
    taken = torch.full((len(rows),), float("nan"), device=scores.device)
    taken[where] = logprobs.gather(1, token_ids[where, None]).squeeze(1)
    top: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * len(rows)
    for line, i in zip(logprobs, asking, strict=True):
        if rows[i].options.top_logprobs_num:
            values, ids = line.topk(rows[i].options.top_logprobs_num)
            top[i] = (values, ids)
    return Sampled(token_ids, outcomes, taken, top)


def _log_softmax(scores: torch.Tensor, *, is_native: bool) -> torch.Tensor:
    """Of rows [B, V] in float32; natively with the bits that ranks find without gathering (`plain_sampling.py`)."""
    if not is_native:
        return torch.log_softmax(scores, dim=-1)
    partial = partial_sums_native(scores, parts_of_columns(scores.shape[1], 1))
    return scores - log_of_sums(partial[None])[:, None]


def score_tokens(logits: torch.Tensor, token_ids: torch.Tensor, top_logprobs_num: int) -> PromptScores:
    """Log-probabilities of given tokens: logits [N, V], token_ids [N] -> N values, N lists of the top ones, N ranks.

    All values of a row whose logits are NaN or infinite are NaN. Equal ones share a rank, the best of theirs.
    """
    logprobs = _log_softmax(logits.float(), is_native=has_native_log_sum_exp(logits)).clamp_(min=MIN_LOGPROB)
    taken = logprobs.gather(1, token_ids[:, None])
    ranks = (logprobs > taken).sum(dim=-1) + 1
    values, ids = (found.tolist() for found in logprobs.topk(top_logprobs_num, dim=-1))
    top = [list(zip(value, index, strict=True)) for value, index in zip(values, ids, strict=True)]
    return PromptScores(taken.squeeze(1).tolist(), top, ranks.tolist())
