"""Logarithms of sums in C++: torch's within their error, and the same bits for any batch and any number of ranks."""

from __future__ import annotations

import pytest
import torch

from waybill.parallel.cpu_ops.library import has_operator
from waybill.parallel.cpu_ops.log_sum_exp import NAME, log_of_sums, partial_sums_native, parts_of_columns

pytestmark = pytest.mark.skipif(not has_operator(NAME), reason="needs AVX2 and a C++ compiler")


def of_ranks(x: torch.Tensor, num_ranks: int) -> torch.Tensor:
    shares = x.split(-(-x.shape[1] // num_ranks), dim=1)
    num_parts = parts_of_columns(x.shape[1], num_ranks)
    return log_of_sums(torch.stack([partial_sums_native(share, num_parts) for share in shares]))


@pytest.mark.parametrize(("num_columns", "ranks"), [(264, (1, 2, 4)), (1000, (1, 2, 4)), (77, (1, 2)), (1, (1,))])
def test_any_batch_and_any_number_of_ranks(num_columns: int, ranks: tuple[int, ...]) -> None:
    x = torch.randn(9, num_columns) * 8
    whole = of_ranks(x, 1)
    torch.testing.assert_close(whole, x.logsumexp(dim=1), rtol=1e-6, atol=4e-6)
    for num_ranks in ranks:
        assert torch.equal(of_ranks(x, num_ranks), whole), num_ranks
        assert torch.equal(torch.cat([of_ranks(row[None], num_ranks) for row in x]), whole), num_ranks


def test_what_is_banned_and_what_is_not_finite() -> None:
    """Minus infinity adds nothing, also where a part has nothing else; NaN and infinity leave no sum."""
    x = torch.randn(4, 64)
    x[0, :16], x[1, 5], x[2, 40], x[3] = -torch.inf, torch.nan, torch.inf, -torch.inf
    found = of_ranks(x, 2)
    torch.testing.assert_close(found[0], x[0].logsumexp(dim=0), rtol=1e-6, atol=4e-6)
    assert not found[1:].isfinite().any()
