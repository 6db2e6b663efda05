"""Softmax, top-k, renormalisation and the recording of the choice as one kernel; twin of `choose_torch` in router.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_launch import Kernel, launch_options, power_of_2_from, start_next, wait_for_previous


@Kernel
@triton.jit
def _choose_kernel(
    logits, ids, weights, record, num_experts, TOP_K: tl.constexpr, K_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
    NORM: tl.constexpr, RECORD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    start_next(PDL)
    wait_for_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    experts, choices = tl.arange(0, BLOCK), tl.arange(0, K_BLOCK)
    inside = experts < num_experts
    row = tl.load(logits + token * num_experts + experts, inside, other=float("-inf")).to(tl.float32)
    row = tl.exp(row - tl.max(row, axis=0))
    total = tl.sum(row, axis=0)
    # Where a logit is NaN or infinite the sum is NaN, and so will the weights be; the ids are still distinct experts.
    is_number = total == total
    scores = tl.where(is_number, row / total, 0.0)
    # Score and expert in one number, so that one reduction finds both: scores are not negative, so their bits are ordered
    # as they are, and of equal scores the lowest expert wins.
    keys = (scores.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (BLOCK - 1 - experts)
    left = tl.where(inside, keys, -1)
    chosen = tl.zeros((K_BLOCK,), tl.int32)
    values = tl.zeros((K_BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        best = tl.max(left, axis=0)
        chosen = tl.where(choices == k, BLOCK - 1 - (best & 0xFFFFFFFF).to(tl.int32), chosen)
        values = tl.where(choices == k, (best >> 32).to(tl.int32).to(tl.float32, bitcast=True), values)
        left = tl.where(left == best, -1, left)
    if NORM:
        values = values / tl.sum(values, axis=0)
    values = tl.where(is_number, values, total)
    place = token * TOP_K + choices
    kept = choices < TOP_K
    tl.store(ids + place, chosen.to(tl.int64), kept)
    tl.store(weights + place, values.to(weights.dtype.element_ty), kept)
    if RECORD:
        tl.store(record + place, chosen.to(record.dtype.element_ty), kept)


def choose_triton(
    logits: torch.Tensor, top_k: int, norm_topk_prob: bool, record: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `choose_torch`."""
    num_tokens, num_experts = logits.shape
    ids = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits.device)
    weights = logits.new_empty(num_tokens, top_k)
    assert record is None or record.is_contiguous()
    _choose_kernel[(num_tokens,)](
        logits, ids, weights, ids if record is None else record, num_experts, TOP_K=top_k,
        K_BLOCK=power_of_2_from(top_k), BLOCK=power_of_2_from(num_experts), NORM=norm_topk_prob,
        RECORD=record is not None, num_warps=1, **launch_options(logits.device),
    )  # fmt: skip
    return ids, weights
