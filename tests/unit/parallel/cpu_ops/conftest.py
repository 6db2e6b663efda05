"""Tests of operators run once for every instruction set that the machine has."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from waybill.parallel.cpu_ops import library


@pytest.fixture(scope="module", params=library.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """The operators are those of this set as long as the module's tests with it run."""
    before = os.environ.get(library.SWITCH)
    os.environ[library.SWITCH] = request.param
    library.load_operators.cache_clear()
    if not library.load_operators():
        pytest.skip("needs a C++ compiler")
    yield request.param
    if before is None:
        del os.environ[library.SWITCH]
    else:
        os.environ[library.SWITCH] = before
    library.load_operators.cache_clear()
