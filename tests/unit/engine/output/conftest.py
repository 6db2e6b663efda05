"""The output processor and the two that it stands between; shared by the tests of this folder."""

from __future__ import annotations

import pytest
from support.output_harness import Engine


@pytest.fixture
def engine() -> Engine:
    return Engine()
