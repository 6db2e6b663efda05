"""Attention in C++: against the definition in float64, and that rows and requests know nothing of each other."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from waybill.parallel.cpu_ops.attention import Pages, attention_native, has_native_attention
from waybill.parallel.cpu_ops.library import SWITCH

pytestmark = pytest.mark.skipif(not has_native_attention(), reason="needs AVX2 and a C++ compiler")


@dataclass(frozen=True)
class Case:
    """Requests of (new, cached) tokens on pages in no order. Slots that nobody owns hold NaN."""

    lengths: list[tuple[int, int]]
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    pages: Pages
    scale: float
    window: int | None = None
    sinks: torch.Tensor | None = None

    def run(self) -> torch.Tensor:
        return attention_native(self.query, self.keys, self.values, self.pages, self.scale, self.window, self.sinks)

    def slots(self, request: int) -> torch.Tensor:
        positions, page_size = torch.arange(sum(self.lengths[request])), self.pages.page_size
        return self.pages.tables[request, positions // page_size].long() * page_size + positions % page_size

    def rows(self, request: int) -> slice:
        first = sum(new for new, _ in self.lengths[:request])
        return slice(first, first + self.lengths[request][0])

    def part(self, request: int, first: int, last: int) -> Case:
        """Rows [first, last) of a request's alone."""
        begin, (_, cached) = self.rows(request).start, self.lengths[request]
        rows = torch.tensor([[0], [last - first], [cached + last]])
        return replace(
            self,
            lengths=[(last - first, cached + first)],
            query=self.query[begin + first : begin + last],
            pages=Pages(self.pages.tables[request : request + 1], rows, self.pages.page_size),
        )


def make_case(
    lengths: list[tuple[int, int]],
    *,
    num_kv_heads: int = 2,
    num_shared: int = 3,
    width: int = 64,
    page_size: int = 4,
    window: int | None = None,
    with_sinks: bool = False,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    q_lens, kv_lens = [new for new, _ in lengths], [new + cached for new, cached in lengths]
    per_req = [-(-n // page_size) for n in kv_lens]
    order = torch.randperm(sum(per_req) + 1, generator=generator).to(torch.int32)
    tables = order[-1].repeat(len(lengths), max(per_req))
    for i, n in enumerate(per_req):
        tables[i, :n] = order[sum(per_req[:i]) : sum(per_req[: i + 1])]
    firsts = [sum(q_lens[:i]) for i in range(len(lengths))]
    pages = Pages(tables, torch.tensor([firsts, q_lens, kv_lens]), page_size)
    num_heads = num_kv_heads * num_shared
    query = torch.randn(sum(q_lens), num_heads, width, generator=generator).bfloat16()
    shape = (len(order) * page_size, num_kv_heads, width)
    sinks = torch.randn(num_heads, generator=generator).bfloat16() if with_sinks else None
    case = Case(lengths, query, torch.zeros(shape), torch.zeros(shape), pages, width**-0.5, window, sinks)
    keys, values = (torch.full(shape, torch.nan).bfloat16() for _ in range(2))
    for i in range(len(lengths)):
        for pool in (keys, values):
            pool[case.slots(i)] = torch.randn(kv_lens[i], *shape[1:], generator=generator).bfloat16()
    return replace(case, keys=keys, values=values)


def exact(case: Case, request: int) -> torch.Tensor:
    """[n, H, d] in float64."""
    new, cached = case.lengths[request]
    query, own = case.query[case.rows(request)].double(), case.slots(request)
    num_shared = query.shape[1] // case.keys.shape[1]
    keys, values = (x[own].double().repeat_interleave(num_shared, dim=1) for x in (case.keys, case.values))
    scores = torch.einsum("nhd,khd->hnk", query, keys) * case.scale
    visible = torch.ones(new, new + cached, dtype=torch.bool).tril(cached)
    if case.window is not None:
        visible = visible.triu(cached - case.window + 1)
    scores.masked_fill_(~visible, -torch.inf)
    if case.sinks is not None:
        scores = torch.cat((scores, case.sinks.double()[:, None, None].expand(-1, new, 1)), dim=-1)
    return torch.einsum("hnk,khd->nhd", scores.softmax(dim=-1)[..., : new + cached], values)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 150)), min_size=1, max_size=4),
    num_kv_heads=st.integers(1, 3),
    num_shared=st.integers(1, 8),
    width=st.sampled_from([1, 7, 8, 16, 40, 64, 72, 128]),
    page_size=st.sampled_from([1, 4, 16]),
    window=st.sampled_from([None, 1, 5, 64, 100]),
    with_sinks=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_definition_within_rounding(
    lengths: list[tuple[int, int]],
    num_kv_heads: int,
    num_shared: int,
    width: int,
    page_size: int,
    window: int | None,
    with_sinks: bool,
    seed: int,
) -> None:
    """Rounded once to bfloat16, 2**-8 of the result; sums in float32 are far closer. Tiles have weights in bfloat16, too,
    each within 2**-9 of itself."""
    case = make_case(
        lengths,
        num_kv_heads=num_kv_heads,
        num_shared=num_shared,
        width=width,
        page_size=page_size,
        window=window,
        with_sinks=with_sinks,
        seed=seed,
    )
    found, sizes = case.run(), replace(case, values=case.values.abs())
    of_weights = 2**-9 if os.environ[SWITCH] == "amx_bf16" else 0.0
    for i in range(len(lengths)):
        expected = exact(case, i)
        bound = 2e-5 + 2**-8 * expected.abs() + of_weights * exact(sizes, i)
        assert ((found[case.rows(i)].double() - expected).abs() <= bound).all()


@pytest.mark.parametrize(("width", "value_width"), [(48, 32), (40, 23), (576, 512)])
def test_values_may_be_the_beginnings_of_keys(width: int, value_width: int) -> None:
    """Latents: one kv head for all, whose heads several threads share where there is one row."""
    case, threads = make_case([(1, 70), (9, 3)], num_kv_heads=1, num_shared=6, width=width), torch.get_num_threads()
    values = case.keys[..., :value_width]
    expected = replace(case, values=case.keys).run()[..., :value_width]
    found = replace(case, values=values).run()
    assert torch.equal(found, expected)
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            assert torch.equal(replace(case.part(0, 0, 1), values=values).run(), found[:1])
    finally:
        torch.set_num_threads(threads)


LENGTHS = [(1, 4), (150, 0), (1, 63), (1, 64), (70, 130), (1, 0), (1, 200), (5, 61)]


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("width", [64, 72])
def test_a_row_has_the_same_bits_however_it_comes(window: int | None, width: int) -> None:
    """Alone or beside others, its prompt in one piece, in chunks or token by token, and with any threads."""
    case = make_case(LENGTHS, width=width, window=window, seed=1)
    together, threads = case.run(), torch.get_num_threads()
    try:
        for num_threads, size in ((1, 1000), (2, 1), (3, 7), (1, 40)):
            torch.set_num_threads(num_threads)
            for i, (new, _) in enumerate(LENGTHS):
                parts = [case.part(i, first, min(first + size, new)).run() for first in range(0, new, size)]
                assert torch.equal(torch.cat(parts), together[case.rows(i)]), (num_threads, size, i)
    finally:
        torch.set_num_threads(threads)


def test_where_a_request_lies_changes_no_bit() -> None:
    """Pages of another size, and in another order."""
    case = make_case([(33, 70)], seed=2)
    own = case.slots(0)
    for page_size in (1, 16):
        other = make_case([(33, 70)], page_size=page_size, seed=3)
        for pool, source in ((other.keys, case.keys), (other.values, case.values)):
            pool[other.slots(0)] = source[own]
        assert torch.equal(replace(other, query=case.query).run(), case.run())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_with_the_rows_that_see_it(value: float) -> None:
    """In a key and in a value of one request, of which earlier rows see neither."""
    lengths = [(1, 40), (90, 0), (1, 80)]
    case = make_case(lengths, seed=4)
    expected = case.run()
    own = case.slots(1)
    case.values[own[50]] = value
    case.keys[own[70], :, 3] = value
    found = case.run()
    for rows in (case.rows(0), case.rows(2), slice(1, 51)):
        assert torch.equal(found[rows], expected[rows])
    assert not found[51:91].isfinite().any()


def test_a_sink_takes_its_share() -> None:
    """Of a score so large that nothing is left, and so small that nothing is taken."""
    case = make_case([(4, 100)], seed=5)
    for score, expected in ((1e4, torch.zeros_like(case.query)), (-1e4, case.run())):
        assert torch.equal(replace(case, sinks=torch.full((6,), score)).run(), expected)


def test_no_rows() -> None:
    case = make_case([(3, 5)])
    nobody = Pages(case.pages.tables[:0], torch.zeros(3, 0, dtype=torch.int64), 4)
    assert replace(case, query=case.query[:0], pages=nobody).run().shape == (0, 6, 64)
