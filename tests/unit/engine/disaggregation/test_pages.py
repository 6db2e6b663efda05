"""Keys and values from the pools of one engine to those of another: who has what, and the bytes."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from waybill.engine.disaggregation.head_plan import head_slices
from waybill.engine.disaggregation.mapped_pool import MappedPool, SharedExport
from waybill.engine.disaggregation.page_copy import DevicePages, HostPages, PageCopy, slots_of
from waybill.engine.disaggregation.pool_export import PoolExport
from waybill.engine.disaggregation.pool_writer import DeviceWriter
from waybill.engine.disaggregation.row_copy import as_words, select_heads
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


def filled(heads: list[int], page_size: int, dtype: torch.dtype, width: int = 3, *, is_shared: bool = False) -> KVStore:
    """A pool in which every value says its layer, tensor, slot and head."""
    specs = [KVTensorSpec("k", (len(heads), width), dtype), KVTensorSpec("latent", (5,), dtype)]
    store = KVStore(2, 32 // page_size, page_size, specs, CPU, is_shared=is_shared)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on_device", [False, True])
def test_positions_are_copied_from_mapped_pools(
    dtype: torch.dtype, on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy on a device is torch's here, between tensors of the host."""
    there = [filled([0, 1], 2, dtype, is_shared=True), filled([2, 3], 2, dtype, is_shared=True)]
    here = KVStore(2, 8, 4, [KVTensorSpec("k", (4, 3), dtype), KVTensorSpec("latent", (5,), dtype)], CPU)
    their_pages, pages = np.array([9, 3, 7, 1], dtype=np.int32), np.array([5, 2], dtype=np.int32)
    for one in head_slices(4, 2, 1, 0):
        store = there[one.rank]
        pool = MappedPool(PoolExport(store, 2, SharedExport(store)).place("1.0", 1), here, 4)
        if on_device:
            monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
            monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
            monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
            pool._writer = DeviceWriter(here)
            pool._sources = pool._writer.sources(store.stacks, store.memory)
        for start, end in ((0, 3), (3, 7)):
            on = their_pages[start // 2 : -(-end // 2)]
            num_bytes = pool.copy(on, pages, start, end, one.theirs, one.ours)
            assert num_bytes == (end - start) * HostPages(store, 2).bytes_per_position(one.theirs)
        pool.close()
    halves = [positions(store, their_pages, 2, 7) for store in there]
    for found, first, second in zip(positions(here, pages, 4, 7), *halves, strict=True):
        assert torch.equal(found, first if found.dim() == 2 else torch.cat([first, second], dim=1))


class Stream:
    cuda_stream = 0

    def synchronize(self) -> None: ...


def test_rows_as_words() -> None:
    stack = torch.arange(2 * 5 * 4 * 2, dtype=torch.float32).view(2, 5, 4, 2)
    words, others = as_words(select_heads(stack, (1, 3)), torch.zeros(2, 7, 2, 2))
    assert words.shape == (2, 5, 2) and others.shape == (2, 7, 2) and words.dtype == others.dtype == torch.int64
    assert torch.equal(words[1, 3].contiguous().view(torch.float32), stack[1, 3, 1:3].flatten())


@pytest.mark.parametrize(
    "odd",
    [
        pytest.param(torch.zeros(2, 5, 3), id="three values of four bytes"),
        pytest.param(torch.zeros(2, 5, 3, 1)[:, :, 1:3], id="not on a word's boundary"),
    ],
)
def test_rows_that_are_no_whole_words(odd: torch.Tensor) -> None:
    even = torch.zeros(2, 7, 2, 2)
    for source, target in ((odd, even), (even, odd)):
        for stack, rows in zip((source, target), as_words(source, target), strict=True):
            assert rows.shape == (*stack.shape[:2], stack[0, 0].numel()) and rows.dtype == stack.dtype
            assert rows.data_ptr() == stack.data_ptr()


@pytest.mark.parametrize("is_shared", [False, True])
def test_memory_is_given_back_after_copies(is_shared: bool) -> None:
    store = filled([0, 1], 2, torch.float32, is_shared=is_shared)
    pages = np.array([5, 2], dtype=np.int32)
    data = HostPages(store, 2).gather(pages, 0, 4, None)
    store.release()
    store.resume()
    assert not any(tensor.any() for tensor in store.tensors())
    HostPages(store, 2).scatter(pages, 0, 4, None, data)
    assert HostPages(store, 2).gather(pages, 0, 4, None) == data


@given(page_size=st.integers(1, 5), num_pages=st.integers(0, 6), data=st.data())
def test_slots_of_positions(page_size: int, num_pages: int, data: st.DataObject) -> None:
    pages = np.array(data.draw(st.permutations(range(num_pages))), dtype=np.int32)
    start = data.draw(st.integers(0, num_pages * page_size))
    end = data.draw(st.integers(start, num_pages * page_size))
    expected = [pages[position // page_size] * page_size + position % page_size for position in range(start, end)]
    assert slots_of(pages, start, end, page_size).tolist() == expected
    with pytest.raises(IndexError, match=f"{num_pages} pages"):
        slots_of(pages, start, num_pages * page_size + 1, page_size)
