"""`torchrun.sh route` for a test."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from support.engine_pair import HOST, free_port
from support.sglang_router import START_TIMEOUT_S, is_well


@contextmanager
def run_router(prefill: str, decode: str, bootstrap_port: int) -> Iterator[str]:
    """Its URL, once it says that both sides are well."""
    port = free_port()
    command = [sys.executable, "-m", "waybill.launch.command_line", "route", "--port", str(port)]
    command += ["--prefill", prefill, str(bootstrap_port), "--decode", decode]
    process = subprocess.Popen(command)
    url, deadline = f"http://{HOST}:{port}", time.monotonic() + START_TIMEOUT_S
    try:
        while not is_well(url):
            assert process.poll() is None and time.monotonic() < deadline, "the router is not ready"
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(30)
