"""A real server, started as a user starts it, and ended with everything that it started."""

from __future__ import annotations

import queue
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 40.0
READY = "waybill is ready: "
# On a CPU torch keeps what oneDNN compiled for 1024 shapes of bfloat16 products, twice: some 900 MiB that fill up over
# minutes and would hide a leak.
FEW_SHAPES = {"LRU_CACHE_CAPACITY": "64", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}


class ServerProcess:
    """`./torchrun.sh serve` on a free port; `url` once it is ready. With `wait=False` it is not waited for."""

    def __init__(
        self,
        *options: str,
        environment: dict[str, str] | None = None,
        prefix: Sequence[str] = (),
        wait: bool = True,
    ) -> None:
        self.process = subprocess.Popen(
            [*prefix, str(ROOT / "torchrun.sh"), "serve", "--port", "0", *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._ready: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        self.url = ""
        if wait:
            self.wait_until_ready()

    def wait_until_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """
        Raises:
            TimeoutError: it is not.
        """
        try:
            line = self._ready.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError(f"the server was not ready within {timeout_s} s") from None
        assert line is not None, "the server ended:\n" + "\n".join(self.lines)
        self.url = line.removeprefix(READY).strip()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if line.startswith(READY):
                self._ready.put(line)
        self._ready.put(None)

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self) -> int:
        """SIGTERM, as an operator sends it; the exit status. It must have run until now, and nothing may be left."""
        assert self.process.poll() is None, "the server has ended:\n" + "\n".join(self.lines)
        started = self.descendants()
        self.process.terminate()
        status = self.process.wait(STOP_TIMEOUT_S)
        _, alive = psutil.wait_procs(started, timeout=10.0)
        for process in alive:
            process.kill()
        assert not alive, f"left behind: {alive}"
        return status
