"""Twin of `read_inputs_torch` in step_tensors.py: one kernel instead of a dozen."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...parallel.triton_launch import Kernel, ceil_div
from .step_tensors import TokenInputs

BLOCK = 128


# Not launched before its predecessor is done, nor is its successor before it: kernels of attention read the lengths before
# they wait for the ones ahead of them.
@Kernel
@triton.jit
def _read_inputs_kernel(
    inputs, last_token_ids, page_table, ids, kv_slots, kv_lens, num_tokens, table_stride, PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = token < num_tokens
    given = tl.load(inputs + token, there, other=0)
    position = tl.load(inputs + num_tokens + token, there, other=0)
    row = tl.load(inputs + 2 * num_tokens + token, there, other=0)
    known = tl.where(given < 0, tl.load(last_token_ids + row, there, other=0), given)
    page = tl.load(page_table + row * table_stride + position // PAGE_SIZE, there, other=0).to(tl.int64)
    tl.store(ids + token, known, there)
    tl.store(kv_slots + token, page * PAGE_SIZE + position % PAGE_SIZE, there)
    tl.store(kv_lens + token, (position + 1).to(tl.int32), there)


def read_inputs_triton(
    inputs: torch.Tensor, last_token_ids: torch.Tensor, page_table: torch.Tensor, page_size: int
) -> TokenInputs:
    """See `read_inputs_torch`; `inputs` are contiguous."""
    num_tokens = inputs.shape[1]
    ids, kv_slots = torch.empty_like(inputs[0]), torch.empty_like(inputs[0])
    kv_lens = torch.empty(num_tokens, dtype=torch.int32, device=inputs.device)
    _read_inputs_kernel[(ceil_div(num_tokens, BLOCK),)](
        inputs, last_token_ids, page_table, ids, kv_slots, kv_lens, num_tokens, page_table.stride(0),
        PAGE_SIZE=page_size, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return TokenInputs(ids, kv_slots, kv_lens)
