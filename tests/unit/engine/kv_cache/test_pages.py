"""Pages under drawn sequences of operations, against a model that keeps every cached prefix as a plain tuple."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from waybill.engine.io_struct import OutputOptions, SamplingParams
from waybill.engine.ipc.frontend_messages import TokenizedGenerateReqInput
from waybill.engine.kv_cache.page_pool import PagePool, no_pages
from waybill.engine.kv_cache.radix_cache import RadixCache
from waybill.engine.scheduler.page_manager import PageManager
from waybill.engine.scheduler.req import Req

NUM_PAGES = 24


def id_bytes(ids: list[int]) -> bytes:
    return np.array(ids, dtype="<i4").tobytes()


def make_req(ids: list[int], extra_key: str) -> Req:
    recv = TokenizedGenerateReqInput(0, "r", id_bytes(ids), SamplingParams(), extra_key=extra_key)
    return Req(recv, bytearray(recv.input_ids))


class PagesMachine(RuleBasedStateMachine):
    """Requests start on their longest cached prefix, compute, decode, finish or are retracted, in any order."""

    page_size = 2

    def __init__(self) -> None:
        super().__init__()
        self.pages = PageManager(NUM_PAGES, self.page_size, enable_prefix_cache=True)
        self.running: list[Req] = []
        # What each page in use was last computed for: (extra key, all tokens up to the page's end).
        self.content: dict[int, tuple[str, bytes]] = {}

    # Few different tokens, so that prefixes are often shared.
    @rule(ids=st.lists(st.integers(0, 1), min_size=1, max_size=12), key=st.sampled_from(["", "other"]))
    def start(self, ids: list[int], key: str) -> None:
        req = make_req(ids, key)
        self.pages.match(req)
        assert req.num_cached < len(ids), "at least one token is left to compute"
        size = self.page_size
        for i, page in enumerate(req.held.pages):
            assert self.content[page] == (key, id_bytes(ids[: (i + 1) * size])), "a page of other tokens was matched"
        req.row = 0
        self.running.append(req)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), num_tokens=st.integers(1, 5))
    def compute(self, data: st.DataObject, num_tokens: int) -> None:
        """A chunk is computed and committed, tokens are decoded where the prompt is done."""
        req = data.draw(st.sampled_from(self.running))
        while req.num_scheduled + num_tokens > req.seqlen:
            req.tokens += id_bytes([data.draw(st.integers(0, 1))])
        missing = self.pages.pages_missing(req, num_tokens)
        available = self.pages.num_available
        taken = self.pages.take(missing)
        assert (taken is not None) == (missing <= available)
        if taken is None:
            return
        held = [page for other in self.running for page in other.held.pages]
        assert not set(taken) & set(held), "a page in use was given away"
        req.held.pages.extend(taken)
        req.num_scheduled += num_tokens
        req.num_committed = req.num_scheduled
        self.pages.offer_full_pages(req)
        for i, page in enumerate(req.held.pages):
            end = (i + 1) * self.page_size
            if end <= req.num_committed:
                self.content[page] = (req.recv.extra_key, req.token_bytes(0, end))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        req = data.draw(st.sampled_from(self.running))
        self.running.remove(req)
        self.pages.release(req)

    @precondition(lambda self: not self.running)
    @rule()
    def flush(self) -> None:
        self.pages.flush()
        assert self.pages.pool.num_free == NUM_PAGES

    @invariant()
    def every_page_has_one_place(self) -> None:
        self.pages.cache.check_integrity()
        self.pages.pool.check_integrity()
        held = [req.held for req in self.running]
        private = [page for each in held for page in [*each.pages[each.num_offered :], *each.duplicates]]
        assert len(set(private)) == len(private)
        total = self.pages.pool.num_free + self.pages.cache.num_cached_pages + len(private)
        assert total == NUM_PAGES

    def teardown(self) -> None:
        for req in self.running:
            self.pages.release(req)
        self.pages.check_integrity()
        self.pages.take(NUM_PAGES)
        assert self.pages.pool.num_free == 0, "with nobody running every page can be had"


class SinglePagesMachine(PagesMachine):
    page_size = 1


TestPages = PagesMachine.TestCase
TestPages.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSinglePages = SinglePagesMachine.TestCase
TestSinglePages.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_page_freed_twice_is_found() -> None:
    pool = PagePool(4, 1)
    pages = pool.allocate(2)
    assert pages is not None and pool.allocate(3) is None
    pool.free(pages)
    with pytest.raises(AssertionError, match="more pages were freed"):
        pool.free(pages)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.check_integrity()


def test_least_recently_used_leaves_go_first_and_locked_ones_stay() -> None:
    cache = RadixCache(1)

    def insert(ids: list[int], pages: list[int]) -> object:
        match = cache.match_prefix(id_bytes(ids), "", 0)
        cache.lock(match.node)
        node, kept = cache.extend(match.node, id_bytes(ids), array("i", pages))
        assert kept == no_pages()
        return node

    first = insert([1, 2], [0, 1])
    second = insert([3, 4], [2, 3])
    cache.unlock(first)
    assert list(cache.evict(4)) == [0, 1], "what a request stands on is never evicted"
    cache.unlock(second)
    # From the end of a path: what is left is still a prefix.
    assert list(cache.evict(1)) == [3]
    assert list(cache.match_prefix(id_bytes([3, 4]), "", 2).pages) == [2]


@pytest.mark.parametrize("leave", ["evict", "flush", "nothing is cached"])
def test_a_root_whose_tree_is_empty_is_forgotten(leave: str) -> None:
    """Clients choose `extra_key`: a thousand different ones must not leave a thousand roots."""
    pages = PageManager(2000, 1, enable_prefix_cache=True)
    cache = pages.cache
    assert isinstance(cache, RadixCache)
    running = []
    for number in range(1000):
        req = make_req([1, 2], f"tenant {number}")
        pages.match(req)
        running.append(req)
        if leave != "nothing is cached":
            taken = pages.take(2)
            assert taken is not None
            req.held.pages.extend(taken)
            req.num_committed = 2
            pages.offer_full_pages(req)
    assert len(cache._roots) == 1000
    for req in running:
        pages.release(req)
    if leave == "evict":
        assert len(cache._roots) == 1000, "their pages are still there"
        pages.pool.free(cache.evict(1000))
        assert len(cache._roots) == 500
        pages.pool.free(cache.evict(1000))
    elif leave == "flush":
        pages.flush()
    assert not cache._roots
    pages.check_integrity()


def test_a_root_that_is_stood_on_outlives_its_tree() -> None:
    pages = PageManager(4, 1, enable_prefix_cache=True)
    cache = pages.cache
    assert isinstance(cache, RadixCache)
    first, second = make_req([1, 2], "tenant"), make_req([3], "tenant")
    pages.match(first)
    taken = pages.take(2)
    assert taken is not None
    first.held.pages.extend(taken)
    first.num_committed = 2
    pages.offer_full_pages(first)
    pages.match(second)
    pages.release(first)
    pages.pool.free(cache.evict(2))
    assert list(cache._roots) == ["tenant"]
    pages.release(second)
    assert not cache._roots


def test_prompt_logprobs_leave_their_positions_to_compute() -> None:
    pages = PageManager(8, 1, enable_prefix_cache=True)
    first = make_req([1, 2, 3, 4], "")
    pages.match(first)
    taken = pages.take(4)
    assert taken is not None
    first.held.pages.extend(taken)
    first.num_committed = 4
    pages.offer_full_pages(first)
    pages.release(first)
    options = OutputOptions(return_logprob=True, logprob_start_len=2)
    recv = TokenizedGenerateReqInput(0, "s", id_bytes([1, 2, 3, 4]), SamplingParams(), options)
    second = Req(recv, bytearray(recv.input_ids))
    pages.match(second)
    assert second.num_cached == 1, "position 1 scores token 2, so it is computed"
