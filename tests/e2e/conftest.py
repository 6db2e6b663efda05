"""Engines and servers on real ranks, shared by the tests of a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.server_process import ServerProcess

from waybill.engine.routing.reference import Reference

CHECKPOINT = Path(__file__).parents[2] / "examples" / "tiny_moe" / "checkpoint"


@pytest.fixture(scope="session")
def checkpoint() -> str:
    """The embedded model."""
    return str(CHECKPOINT)


@pytest.fixture(scope="session")
def reference(checkpoint: str) -> Reference:
    """The embedded model under `transformers`. Many settings give the same answers to the same prompts."""
    return Reference(checkpoint, num_kept=256)


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """The embedded model on two tensor-parallel ranks, behind HTTP."""
    server = ServerProcess("--enable-return-routed-experts", "--kv-cache-tokens", "16384", "--dtype", "float32")
    yield server
    server.stop()
