"""Twin of `copy_rows_torch` in row_copy.py: one kernel for all layers, which reads a peer's memory over the link and writes
each row where it belongs, with nothing in between."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...parallel.triton_launch import Kernel, ceil_div, power_of_2_from

# Words of one program. A link is slow to answer, so many reads must be under way; and few programs are fast to start.
TILE_WORDS = 1024
MAX_BLOCK = 512
NUM_WARPS = 4


# One kernel for any number of rows: each prompt has another one.
@Kernel
@triton.jit(do_not_specialize=["num_rows"])
def _copy_rows_kernel(
    source, target, there, here, source_layer, source_slot, target_layer, target_slot, num_rows, num_words,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    words = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    is_row = rows < num_rows
    kept = is_row[:, None] & (words < num_words)[None, :]
    first = source + layer * source_layer + tl.load(there + rows, is_row, 0) * source_slot
    last = target + layer * target_layer + tl.load(here + rows, is_row, 0) * target_slot
    tl.store(last[:, None] + words[None, :], tl.load(first[:, None] + words[None, :], kept), kept)


def copy_rows_triton(source: torch.Tensor, target: torch.Tensor, there: torch.Tensor, here: torch.Tensor) -> None:
    """See `copy_rows_torch`."""
    num_layers, _, num_words = source.shape
    block = min(MAX_BLOCK, power_of_2_from(num_words))
    rows = max(1, TILE_WORDS // block)
    _copy_rows_kernel[(ceil_div(len(there), rows), num_layers, ceil_div(num_words, block))](
        source,
        target,
        there,
        here,
        source.stride(0),
        source.stride(1),
        target.stride(0),
        target.stride(1),
        len(there),
        num_words,
        ROWS=rows,
        BLOCK=block,
        num_warps=NUM_WARPS,
    )
