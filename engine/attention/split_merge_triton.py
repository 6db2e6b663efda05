"""Attention over keys that were split over several programs (Flash-Decoding, Dao et al. 2023): their results as one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...parallel.triton_launch import Kernel, launch_options, power_of_2_from, start_next, wait_for_previous

# Of a head's results, those that one program merges.
MAX_COLUMNS = 128
# Splits that one warp merges.
MAX_OF_ONE_WARP = 32


@Kernel
@triton.jit
def _merge_kernel(
    partial, lse, sinks, out, num_heads, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, NUM_SPLITS: tl.constexpr,
    SINKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    start_next(PDL)
    wait_for_previous(PDL)
    head = tl.program_id(0).to(tl.int64)
    splits, columns = tl.arange(0, NUM_SPLITS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    logs = tl.load(lse + head * NUM_SPLITS + splits)
    best = tl.max(logs, axis=0)
    weights = tl.exp(logs - best)
    total = tl.sum(weights, axis=0)
    if SINKS:
        total += tl.exp(tl.load(sinks + head % num_heads).to(tl.float32) - best)
    weights = weights / total
    parts = tl.load(partial + (head * NUM_SPLITS + splits[:, None]) * WIDTH + columns[None, :])
    tl.store(out + head * WIDTH + columns, tl.sum(parts * weights[:, None], axis=0).to(out.dtype.element_ty))


def choose_num_splits(num_programs: int, wanted: int, most: int) -> int:
    """A power of two, so that about as many programs are at work as are wanted."""
    return min(most, power_of_2_from(max(1, wanted // num_programs)))


def merge_splits(
    partial: torch.Tensor, lse: torch.Tensor, out: torch.Tensor, sinks: torch.Tensor | None = None
) -> None:
    """Results [B, H, n, d] of n splits and their log-sum-exp [B, H, n], float32, to `out` [B, H, d]; n and d are powers of
    two. A split without keys has -inf. `sinks` [H] are scores of keys without values, which no split has seen."""
    num_reqs, num_heads, num_splits, width = partial.shape
    columns = min(width, MAX_COLUMNS)
    _merge_kernel[(num_reqs * num_heads, width // columns)](
        partial, lse, out if sinks is None else sinks, out, num_heads, WIDTH=width, COLUMNS=columns,
        NUM_SPLITS=num_splits, SINKS=sinks is not None, num_warps=1 if num_splits <= MAX_OF_ONE_WARP else 4,
        **launch_options(out.device),
    )  # fmt: skip
