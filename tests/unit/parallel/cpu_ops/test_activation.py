"""SwiGLU and sigmoid in C++: torch's within their error, and a number's bits do not depend on its place."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from waybill.parallel.cpu_ops.activation import SIGMOID, sigmoid, swiglu_native
from waybill.parallel.cpu_ops.library import has_operator

pytestmark = pytest.mark.skipif(not has_operator(SIGMOID), reason="needs AVX2 and a C++ compiler")
FAR = torch.tensor([-torch.inf, -1000.0, -90.0, 0.0, 90.0, 1000.0, torch.inf, torch.nan])


@pytest.mark.parametrize("width", [1, 15, 16, 33, 96])
def test_swiglu(width: int) -> None:
    """One rounding to the other side where torch's function of the gate differs in its last bit."""
    gate_up = torch.randn(9, 2 * width + 7).bfloat16()[:, : 2 * width]
    gate_up[0, 0] = -300.0
    found, expected = swiglu_native(gate_up), F.silu(gate_up[:, :width]) * gate_up[:, width:]
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=1e-30)
    assert torch.equal(torch.cat([swiglu_native(row[None]) for row in gate_up]), found)


def test_sigmoid() -> None:
    x = torch.cat((torch.randn(90) * 6, FAR))
    found = sigmoid(x)
    torch.testing.assert_close(found, x.sigmoid(), rtol=4e-6, atol=1e-30, equal_nan=True)
    alone = torch.cat([sigmoid(number[None]) for number in x])
    assert torch.equal(found.nan_to_num(), alone.nan_to_num())
    assert sigmoid(x.bfloat16()[:, None]).shape == (98, 1)
    torch.testing.assert_close(sigmoid(x.bfloat16()), x.bfloat16().sigmoid(), rtol=2**-7, atol=1e-30, equal_nan=True)
