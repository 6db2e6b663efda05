"""Engines and servers on real ranks, shared by the tests of a session."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.process_tree import DEADLINE_S
from support.server_process import ServerProcess
from xdist.scheduler import LoadScopeScheduling

from waybill import Engine
from waybill.engine.routing.transformers_reference import Reference

if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads of ranks spin while they wait for each other: each worker has cores of its own, and so have its ranks.
    cores = sorted(os.sched_getaffinity(0))
    number = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    os.sched_setaffinity(0, cores[number :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])] or cores)
    # One that wakes up preempts no other: gloo's would spin for a lock whose holder they have preempted, which takes longer
    # than the model where the ranks have one core.
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))

# Files whose tests share the server that is made here.
WITH_SERVER = {
    "test_api_docs.py",
    "test_conformance.py",
    "test_exposure.py",
    "test_http_aborts.py",
    "test_http_control.py",
    "test_http_fuzz.py",
    "test_http_information.py",
    "test_http_native.py",
    "test_http_openai.py",
    "test_http_refusals.py",
    "test_nodes.py",
    "test_not_finite.py",
}
# The same, of the engine.
WITH_ENGINE = {"test_engine_requests.py", "test_routed_experts.py", "test_router_weights.py"}
# Files whose tests start what they need, each for itself; the long ones first.
INDEPENDENT = ("test_reference_equality.py", "test_model_families.py", "test_death.py", "test_start_and_end.py")
CHECKPOINT = Path(__file__).parents[2] / "examples" / "tiny_moe" / "checkpoint"


class SharedEngines(LoadScopeScheduling):
    """One worker runs all tests that share an engine or a server, of a file or of several."""

    def _split_scope(self, nodeid: str) -> str:
        file = Path(nodeid.partition("::")[0])
        name = file.name
        if name in INDEPENDENT:
            return nodeid
        if file.parent.name == "weight_sync":
            return "weight_sync"
        if name in WITH_ENGINE:
            return "engine"
        return "server" if name in WITH_SERVER else name


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> SharedEngines:
    return SharedEngines(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Single tests come last, when they go to whichever worker is free."""
    items.sort(key=lambda item: INDEPENDENT.index(item.path.name) if item.path.name in INDEPENDENT else -1)


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
    recorded = ("--enable-return-routed-experts", "--enable-return-router-weights")
    server = ServerProcess(*recorded, "--kv-cache-tokens", "16384", "--dtype", "float32")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60.0) as client:
        yield client


@pytest.fixture(scope="session")
def engine(checkpoint: str) -> Iterator[Engine]:
    """The embedded model on two tensor-parallel ranks, asked by the tests' own program."""
    options = {"enable_return_routed_experts": True, "enable_return_router_weights": True, "kv_cache_tokens": 8192}
    with Engine(checkpoint, tp_size=2, **options) as engine:
        yield engine


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A temporary folder of the test's own, for everything that it starts; nothing may be left in it. Its path is short:
    sockets lie in there."""
    # pytest's own folder is made on first use.
    tmp_path_factory.getbasetemp()
    folder = Path(tempfile.mkdtemp(prefix="wb-"))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    before = shared_memory()
    yield folder
    deadline = time.monotonic() + DEADLINE_S
    while os.listdir(folder):
        assert time.monotonic() < deadline, f"left behind: {os.listdir(folder)}"
        time.sleep(0.05)
    assert shared_memory() <= before
    folder.rmdir()


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))
