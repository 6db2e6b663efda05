"""How rows are packed for the way: every number of rows, of every width and dtype, comes back as it was."""

from __future__ import annotations

import pytest
import torch

from waybill.parallel.moe.dispatch import NO_EXPERT, mask_padding, pack, unpack
from waybill.parallel.moe.router import RouterOutput


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
@pytest.mark.parametrize("hidden_size", [4, 5, 6])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 5])
def test_what_is_packed_comes_back(dtype: torch.dtype, top_k: int, hidden_size: int, num_rows: int) -> None:
    torch.manual_seed(0)
    hidden, weights = torch.randn(num_rows, hidden_size).to(dtype), torch.rand(num_rows, top_k).to(dtype)
    routed = RouterOutput(torch.randint(0, 300, (num_rows, top_k)), weights)
    ids = mask_padding(routed.ids, torch.arange(num_rows) >= num_rows - 1)
    packed = pack(hidden, ids, weights)
    assert packed.dtype == torch.uint8 and packed.shape[0] == num_rows
    # As it arrives: in memory of its own.
    arrived = unpack(packed.clone(), hidden, routed)
    assert torch.equal(arrived[0], hidden)
    assert torch.equal(arrived[1][: num_rows - 1], routed.ids[: num_rows - 1])
    assert arrived[1].dtype == routed.ids.dtype
    assert (arrived[1][num_rows - 1 :] == NO_EXPERT).all()
    assert torch.equal(arrived[2], weights)
