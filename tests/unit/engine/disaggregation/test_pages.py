"""Keys and values from the pools of one engine to those of another: who has what, and the bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from waybill.engine.disaggregation.head_plan import head_slices
from waybill.engine.disaggregation.page_copy import DevicePages, HostPages, PageCopy
from waybill.engine.kv_cache.kv_store import KVStore, KVTensorSpec

CPU = torch.device("cpu")
LAYOUTS = [(heads, p, d) for heads in (1, 2, 4, 8) for p in (1, 2, 4) for d in (1, 2, 4)]


def own_heads(num_heads: int, tp_size: int, rank: int) -> list[int]:
    """As `QKVParallelLinear` shards them."""
    if num_heads >= tp_size:
        each = num_heads // tp_size
        return list(range(rank * each, (rank + 1) * each))
    return [rank // (tp_size // num_heads)]


@pytest.mark.parametrize(("num_heads", "prefill_tp", "decode_tp"), LAYOUTS)
def test_every_head_comes_once_from_a_rank_that_has_it(num_heads: int, prefill_tp: int, decode_tp: int) -> None:
    for rank in range(decode_tp):
        found = []
        for one in head_slices(num_heads, prefill_tp, decode_tp, rank):
            assert one.theirs is not None and one.ours is not None
            theirs = own_heads(num_heads, prefill_tp, one.rank)[slice(*one.theirs)]
            assert theirs == own_heads(num_heads, decode_tp, rank)[slice(*one.ours)] != []
            found += theirs
        assert found == own_heads(num_heads, decode_tp, rank)
    assert head_slices(num_heads, prefill_tp, decode_tp, 0)[0].rank == 0, (
        "the leader's rank has what the prefill came to"
    )


def test_a_latent_is_asked_of_one_rank() -> None:
    assert [head_slices(0, 2, 4, rank)[0].rank for rank in range(4)] == [0, 1, 0, 1]


def filled(heads: list[int], page_size: int, dtype: torch.dtype, width: int = 3) -> KVStore:
    """A pool in which every value says its layer, tensor, slot and head."""
    specs = [KVTensorSpec("k", (len(heads), width), dtype), KVTensorSpec("latent", (5,), dtype)]
    store = KVStore(2, 32 // page_size, page_size, specs, CPU)
    for index, tensor in enumerate(store.tensors()):
        slots = torch.arange(len(tensor))
        tensor += (slots + 100 * index).view(-1, *[1] * (tensor.dim() - 1))
        if tensor.dim() == 3:
            tensor += 50 * torch.tensor(heads).view(1, -1, 1)
    return store


def positions(store: KVStore, pages: np.ndarray, page_size: int, end: int) -> list[torch.Tensor]:
    slots = [int(pages[p // page_size]) * page_size + p % page_size for p in range(end)]
    return [tensor[slots] for tensor in store.tensors()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [HostPages, DevicePages])
def test_positions_go_from_two_ranks_to_one_of_another_page_size(make: type[HostPages], dtype: torch.dtype) -> None:
    there = [filled([0, 1], 2, dtype), filled([2, 3], 2, dtype)]
    here = KVStore(2, 8, 4, [KVTensorSpec("k", (4, 3), dtype), KVTensorSpec("latent", (5,), dtype)], CPU)
    copies: list[PageCopy] = [make(store, 2) for store in there]
    own: PageCopy = make(here, 4)
    their_pages, pages = np.array([9, 3, 7, 1], dtype=np.int32), np.array([5, 2], dtype=np.int32)
    for one in head_slices(4, 2, 1, 0):
        for start, end in ((0, 3), (3, 7)):
            data = copies[one.rank].gather(their_pages, start, end, one.theirs)
            assert data.nbytes == (end - start) * copies[one.rank].bytes_per_position(one.theirs)
            own.scatter(pages, start, end, one.ours, data)
    halves = [positions(store, their_pages, 2, 7) for store in there]
    for found, first, second in zip(positions(here, pages, 4, 7), *halves, strict=True):
        assert torch.equal(found, first if found.dim() == 2 else torch.cat([first, second], dim=1))
    with pytest.raises(ValueError, match="bytes of keys and values arrived in place of"):
        own.scatter(pages, 0, 2, None, data)
