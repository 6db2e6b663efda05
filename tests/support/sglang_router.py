"""sglang's router as its wheel starts it, for a test."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from support.engine_pair import HOST, free_port

START_TIMEOUT_S = 60.0


@contextmanager
def run_sglang_router(*options: str) -> Iterator[str]:
    """Its URL, once it says that it is well."""
    port = free_port()
    command = [sys.executable, "-m", "sglang_router.launch_router", "--host", HOST, "--port", str(port)]
    command += ["--prometheus-port", str(free_port()), "--log-level", "warn", *options]
    process = subprocess.Popen(command, start_new_session=True)
    url, deadline = f"http://{HOST}:{port}", time.monotonic() + START_TIMEOUT_S
    try:
        while not is_well(url):
            assert process.poll() is None and time.monotonic() < deadline, "the router is not ready"
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def is_well(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False
