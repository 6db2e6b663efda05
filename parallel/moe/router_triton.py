"""Scores, top-k, weights and the recording of the choice as one kernel; twin of `choose_torch` in router.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_launch import Kernel, launch_options, power_of_2_from, start_next, wait_for_previous
from .router import EPSILON, RouterConfig


@triton.jit
def _ordered(scores):
    """The bits of float32 numbers as int64 in the numbers' order."""
    bits = scores.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _competing(scores, inside, groups, NUM_GROUPS: tl.constexpr, NUM_CHOSEN: tl.constexpr, GROUPS: tl.constexpr):
    """Whether a group [G, 1] is one of the best, by the sum of the two best scores [G, S] of each."""
    lowest: tl.constexpr = -0x7FFFFFFFFFFFFFFF
    places = tl.arange(0, inside.shape[1])[None, :]
    keys = tl.where(inside, (_ordered(scores) << 32) | (inside.shape[1] - 1 - places), lowest)
    first = tl.max(keys, axis=1)[:, None]
    best = tl.sum(tl.where(keys == first, scores, 0.0), axis=1)
    keys = tl.where(keys == first, lowest, keys)
    second = tl.max(keys, axis=1)[:, None]
    best += tl.sum(tl.where(keys == second, scores, 0.0), axis=1)
    left = tl.where(groups < NUM_GROUPS, (_ordered(best) << 32) | (GROUPS - 1 - groups), lowest)
    chosen = groups < 0
    for _ in tl.static_range(NUM_CHOSEN):
        highest = tl.max(left, axis=0)
        chosen = chosen | (left == highest)
        left = tl.where(left == highest, lowest, left)
    return chosen[:, None]


@Kernel
@triton.jit
def _choose_kernel(
    logits, correction, ids, weights, record, num_experts, scale, epsilon, SCORING: tl.constexpr, TOP_K: tl.constexpr,
    K_BLOCK: tl.constexpr, NUM_GROUPS: tl.constexpr, NUM_CHOSEN: tl.constexpr, GROUPS: tl.constexpr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, CORRECT: tl.constexpr, RECORD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A token's experts as [GROUPS, BLOCK], groups of SIZE each."""
    start_next(PDL)
    wait_for_previous(PDL)
    lowest: tl.constexpr = -0x7FFFFFFFFFFFFFFF
    token = tl.program_id(0).to(tl.int64)
    groups, choices = tl.arange(0, GROUPS), tl.arange(0, K_BLOCK)
    places = tl.arange(0, BLOCK)[None, :]
    experts = groups[:, None] * SIZE + places
    inside = (places < SIZE) & (groups[:, None] < NUM_GROUPS)
    row = tl.load(logits + token * num_experts + experts, inside, other=float("-inf")).to(tl.float32)
    # Where a logit is NaN, or infinite under a softmax, so will the weights be; the ids are still distinct experts.
    if SCORING == "softmax":
        row = tl.exp(row - tl.max(tl.max(row, axis=1), axis=0))
        total = tl.sum(tl.sum(row, axis=1), axis=0)
        row = row / total
    elif SCORING == "sigmoid":
        row = 1.0 / (1.0 + tl.exp(-row))
        total = tl.sum(tl.sum(tl.where(inside, row, 0.0), axis=1), axis=0)
    else:
        total = tl.sum(tl.sum(tl.where(inside, row, 0.0), axis=1), axis=0)
    is_number = total == total
    scores = tl.where(is_number, row, 0.0)
    wanted = scores
    if CORRECT:
        wanted = scores + tl.load(correction + experts, inside, other=0.0)
    competes = inside
    if NUM_GROUPS > 1:
        competes = inside & _competing(wanted, inside, groups, NUM_GROUPS, NUM_CHOSEN, GROUPS)
    # Score and expert in one number, so that one reduction finds both: of equal scores the lowest expert wins.
    keys = (_ordered(wanted) << 32) | (GROUPS * BLOCK - 1 - experts)
    left = tl.where(competes, keys, lowest)
    chosen = tl.zeros((K_BLOCK,), tl.int32)
    values = tl.zeros((K_BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        best = tl.max(tl.max(left, axis=1), axis=0)
        found = left == best
        chosen = tl.where(choices == k, tl.sum(tl.sum(tl.where(found, experts, 0), axis=1), axis=0), chosen)
        values = tl.where(choices == k, tl.sum(tl.sum(tl.where(found, scores, 0.0), axis=1), axis=0), values)
        left = tl.where(found, lowest, left)
    kept = choices < TOP_K
    if SCORING == "softmax_of_chosen":
        values = tl.where(kept, values, float("-inf"))
        values = tl.exp(values - tl.max(values, axis=0))
        values = values / tl.sum(values, axis=0)
    elif NORM:
        values = values / (tl.sum(values, axis=0) + epsilon)
    values = tl.where(is_number, values * scale, total)
    place = token * TOP_K + choices
    tl.store(ids + place, chosen.to(tl.int64), kept)
    tl.store(weights + place, values.to(weights.dtype.element_ty), kept)
    if RECORD:
        tl.store(record + place, chosen.to(record.dtype.element_ty), kept)


def choose_triton(
    logits: torch.Tensor,
    config: RouterConfig,
    correction: torch.Tensor | None,
    record: torch.Tensor | None,
    weights_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `choose_torch`."""
    num_tokens, num_experts = logits.shape
    top_k, size = config.top_k, num_experts // config.num_groups
    ids = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits.device)
    weights = logits.new_empty(num_tokens, top_k, dtype=weights_dtype)
    assert record is None or record.is_contiguous()
    _choose_kernel[(num_tokens,)](
        logits, logits if correction is None else correction, ids, weights, ids if record is None else record,
        num_experts, config.scale, EPSILON if config.scoring == "sigmoid" else 0.0, SCORING=config.scoring, TOP_K=top_k,
        K_BLOCK=power_of_2_from(top_k), NUM_GROUPS=config.num_groups, NUM_CHOSEN=config.num_chosen_groups,
        GROUPS=power_of_2_from(config.num_groups), SIZE=size, BLOCK=power_of_2_from(size), NORM=config.renormalises,
        CORRECT=correction is not None, RECORD=record is not None, num_warps=1, **launch_options(logits.device),
    )  # fmt: skip
    return ids, weights
