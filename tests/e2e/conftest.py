"""Engines on real ranks, shared by the tests of a module."""

from __future__ import annotations

from pathlib import Path

import pytest

CHECKPOINT = Path(__file__).parents[2] / "examples" / "tiny_moe" / "checkpoint"


@pytest.fixture(scope="session")
def checkpoint() -> str:
    """The embedded model."""
    return str(CHECKPOINT)
