"""Twin of `copy_rows_torch` in row_copy.py: one kernel for all layers, which reads a peer's memory over the link and writes
each row where it belongs, with nothing in between."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...parallel.triton_launch import Kernel, ceil_div, power_of_2_from

MAX_BLOCK = 512


@Kernel
@triton.jit
def _copy_rows_kernel(
    source, target, there, here, source_layer, source_slot, target_layer, target_slot, num_words, BLOCK: tl.constexpr
):
    row, layer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    words = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    kept = words < num_words
    first = source + layer * source_layer + tl.load(there + row) * source_slot
    values = tl.load(first + words, kept)
    tl.store(target + layer * target_layer + tl.load(here + row) * target_slot + words, values, kept)


def copy_rows_triton(source: torch.Tensor, target: torch.Tensor, there: torch.Tensor, here: torch.Tensor) -> None:
    """See `copy_rows_torch`."""
    num_layers, _, num_words = source.shape
    block = min(MAX_BLOCK, power_of_2_from(num_words))
    _copy_rows_kernel[(len(there), num_layers, ceil_div(num_words, block))](
        source,
        target,
        there,
        here,
        source.stride(0),
        source.stride(1),
        target.stride(0),
        target.stride(1),
        num_words,
        BLOCK=block,
        num_warps=max(1, min(4, block // 128)),
    )
