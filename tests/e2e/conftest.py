"""Engines and servers on real ranks, shared by the tests of a session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.server_process import ServerProcess

from waybill.engine.routing.transformers_reference import Reference

if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads of ranks spin while they wait for each other: each worker has cores of its own, and so have its ranks.
    cores = sorted(os.sched_getaffinity(0))
    number = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    os.sched_setaffinity(0, cores[number :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])] or cores)

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
