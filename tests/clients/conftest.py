"""One server for all clients, and what a trainer does to it while one of them waits for an answer."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.server_process import ServerProcess

# It asks for prices on the internet otherwise.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

CHECKPOINT = Path(__file__).parents[2] / "examples" / "tiny_moe" / "checkpoint"
OPTIONS = ("--tp", "1", "--enable-return-routed-experts", "--kv-cache-tokens", "8192")


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    started = ServerProcess(*OPTIONS)
    yield started
    started.stop()


@pytest.fixture(scope="session")
def second_server() -> Iterator[ServerProcess]:
    """For a router."""
    started = ServerProcess(*OPTIONS)
    yield started
    started.stop()


@pytest.fixture
def during_update(server: ServerProcess) -> Callable[[Callable[[], Any]], Any]:
    """Calls a client in a pause, takes new weights, goes on, and returns what the client got."""

    def run(call: Callable[[], Any]) -> Any:
        found: list[Any] = []

        def wait() -> None:
            found.append(call())

        with httpx.Client(base_url=server.url, timeout=60) as trainer:
            trainer.post("/pause_generation", json={"mode": "in_place"}).raise_for_status()
            caller = threading.Thread(target=wait)
            caller.start()
            # It waits as long as the pause lasts.
            caller.join(1.0)
            assert caller.is_alive()
            update = {"model_path": str(CHECKPOINT), "weight_version": f"after {call.__name__}"}
            trainer.post("/update_weights_from_disk", json=update).raise_for_status()
            trainer.post("/continue_generation", json={}).raise_for_status()
            caller.join(60.0)
            version = trainer.get("/get_weight_version").json()["weight_version"]
        assert version == f"after {call.__name__}"
        (answer,) = found
        return answer

    return run
