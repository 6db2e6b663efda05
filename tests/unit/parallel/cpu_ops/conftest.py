"""Every test of the operators, on each instruction set that this processor has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from waybill.parallel.cpu_ops.library import SWITCH, supported_sets


@pytest.fixture(scope="module", params=supported_sets() or ("off",), autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, request.param)
        yield request.param
