"""The product in C++: against sums in float64, and that a row's bits depend on nothing but the row and the matrix."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from waybill.parallel.collectives import sum_of_terms
from waybill.parallel.cpu_ops.library import parts_of
from waybill.parallel.cpu_ops.linear import (
    has_native_linear,
    linear_native,
    row_parallel_native,
    wide_linear_native,
)

pytestmark = pytest.mark.skipif(not has_native_linear(torch.bfloat16), reason="needs AVX2 and a C++ compiler")

MAX_ROWS = 64


@pytest.fixture
def restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def problem(num_tokens: int, num_outputs: int, width: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (
        torch.randn(*shape, generator=generator).bfloat16()
        for shape in ((num_tokens, width), (num_outputs, width), (num_outputs,))
    )
    return x, weight, bias


def assert_within_rounding(
    found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """One rounding to bfloat16, 2**-8 of the result (it keeps eight bits), and those of the sum in float32: products of
    bfloat16 are exact in it, and each of C additions rounds by 2**-24 of the sum so far, at most the terms' sizes."""
    terms = (x.double(), weight.double(), None if bias is None else bias.double())
    exact = F.linear(*terms)
    sizes = F.linear(*(None if term is None else term.abs() for term in terms))
    bound = 2**-8 * exact.abs() + (x.shape[1] + 1) * 2**-24 * (1 + 2**-8) * sizes
    assert ((found.double() - exact).abs() <= bound).all()


@settings(max_examples=80, deadline=None)
@given(
    num_tokens=st.integers(0, MAX_ROWS),
    num_outputs=st.integers(1, 70),
    width=st.integers(1, 200),
    with_bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_product_is_exact_within_rounding(
    num_tokens: int, num_outputs: int, width: int, with_bias: bool, seed: int
) -> None:
    x, weight, bias = problem(num_tokens, num_outputs, width, seed)
    used = bias if with_bias else None
    found = linear_native(x, weight, used)
    assert found.shape == (num_tokens, num_outputs) and found.dtype == torch.bfloat16
    assert_within_rounding(found, x, weight, used)


@pytest.mark.parametrize(("num_outputs", "width"), [(1, 32), (7, 1), (37, 1000), (64, 96), (130, 256)])
def test_a_row_has_the_same_bits_in_any_batch_and_with_any_threads(
    num_outputs: int, width: int, restored_threads: None
) -> None:
    x, weight, bias = problem(MAX_ROWS, num_outputs, width)
    torch.set_num_threads(1)
    alone = torch.cat([linear_native(row[None], weight, bias) for row in x])
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        for size in range(1, MAX_ROWS + 1):
            for rows in (slice(size), slice(MAX_ROWS - size, MAX_ROWS)):
                assert torch.equal(linear_native(x[rows], weight, bias), alone[rows]), (num_threads, size)


def test_rows_of_a_prefill_have_the_bits_that_they_have_alone() -> None:
    x, weight, bias = problem(515, 40, 160)
    together = linear_native(x, weight, bias)
    for first, last in ((0, 1), (3, 4), (511, 515), (100, 300)):
        assert torch.equal(linear_native(x[first:last], weight, bias), together[first:last])


def test_rows_need_not_be_one_behind_the_other() -> None:
    x, weight, bias = problem(5, 12, 40)
    expected = linear_native(x, weight, bias)
    wide_x, wide_weight = torch.full((5, 99), torch.nan).bfloat16(), torch.full((12, 77), torch.nan).bfloat16()
    wide_x[:, 3:43], wide_weight[:, 30:70] = x, weight
    spread = torch.stack((bias, bias), dim=1)[:, 0]
    assert torch.equal(linear_native(wide_x[:, 3:43], wide_weight[:, 30:70], spread), expected)
    assert torch.equal(linear_native(x.t().contiguous().t(), weight.t().contiguous().t(), bias), expected)
    assert torch.equal(linear_native(x[::2], weight[1::3], bias[1::3]), expected[::2, 1::3])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("width", [40, 64])
def test_what_is_not_finite_goes_where_torch_has_it(value: float, width: int) -> None:
    """In an input, a weight and a bias; infinity times zero, and infinity less infinity, are NaN."""
    x, weight, bias = problem(6, 9, width)
    x[1, width - 1], x[4] = value, 0.0
    weight[2, 0], weight[7, 3], weight[7, 5] = value, value, -value
    bias[5] = value
    found, expected = linear_native(x, weight, bias), F.linear(x, weight, bias)
    for of in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(of(found), of(expected)), of
    assert expected[4].isnan().tolist() == [row in (2, 7) or (row == 5 and value != value) for row in range(9)]


def test_nothing_beyond_the_weight_is_used() -> None:
    """Sizes whose last tile is cut."""
    for num_outputs in (1, 3, 5, 17):
        x, weight, _ = problem(3, num_outputs, 33)
        around = torch.full((num_outputs + 1, 33), torch.nan).bfloat16()
        around[:-1] = weight
        assert torch.equal(linear_native(x, around[:-1]), linear_native(x, weight))


@settings(max_examples=40, deadline=None)
@given(
    num_tokens=st.integers(1, MAX_ROWS),
    num_outputs=st.integers(1, 40),
    half=st.one_of(st.integers(1, 150), st.sampled_from([64, 128, 192])),
    with_bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_one_rank_has_the_bits_of_two_and_of_four(
    num_tokens: int, num_outputs: int, half: int, with_bias: bool, seed: int
) -> None:
    """Of a matrix whose columns are sharded; the first rank has the bias. Two ranks have those of four before the sums are
    rounded, which hides most differences."""
    x, weight, bias = problem(num_tokens, num_outputs, 2 * half, seed)
    sums = []
    whole = row_parallel_native(x, weight, bias if with_bias else None, num_ranks=1)
    assert_within_rounding(whole, x, weight, bias if with_bias else None)
    for num_ranks in (2,) if half % 2 else (2, 4):
        terms = torch.stack(
            [
                row_parallel_native(
                    x.chunk(num_ranks, 1)[rank],
                    weight.chunk(num_ranks, 1)[rank],
                    bias if with_bias and rank == 0 else None,
                    num_ranks=num_ranks,
                )
                for rank in range(num_ranks)
            ]
        )
        assert terms.dtype == torch.float32
        sums.append(sum_of_terms(terms))
        assert torch.equal(sums[-1].bfloat16(), whole)
    assert torch.equal(sums[0], sums[-1])


def test_one_rank_adds_a_bias_where_several_do() -> None:
    """So many sums that rounding hides not all of a bias that is added behind the parts."""
    x, weight, bias = problem(256, 2048, 512)
    bias = bias * 20
    whole = row_parallel_native(x, weight, bias, num_ranks=1)
    for num_ranks in (2, 4):
        parts = zip(x.chunk(num_ranks, 1), weight.chunk(num_ranks, 1), strict=True)
        terms = [
            row_parallel_native(part, of_part, None if rank else bias, num_ranks=num_ranks)
            for rank, (part, of_part) in enumerate(parts)
        ]
        assert torch.equal(sum_of_terms(torch.stack(terms)).bfloat16(), whole)


@pytest.mark.parametrize(
    ("size", "num_ranks", "parts"),
    [(64, 1, 4), (32, 2, 2), (16, 4, 1), (8, 8, 1), (6, 1, 2), (3, 2, 1), (7, 1, 1), (4, 3, 1)],
)
def test_ranks_share_four_parts_or_as_many_as_there_can_be(size: int, num_ranks: int, parts: int) -> None:
    assert parts_of(size, num_ranks) == parts


def test_a_wide_result_is_not_rounded() -> None:
    x, weight, _ = problem(5, 9, 77)
    assert torch.equal(wide_linear_native(x, weight).bfloat16(), linear_native(x, weight))


def test_columns_that_two_ranks_cannot_share_are_one_sum() -> None:
    x, weight, bias = problem(3, 8, 77)
    assert torch.equal(row_parallel_native(x, weight, bias, num_ranks=1), linear_native(x, weight, bias))
