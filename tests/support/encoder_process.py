"""`torchrun.sh encode` for a test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.engine_pair import free_port

SECRET = "images of a test, 32 bytes long"
VARIABLE = "WAYBILL_RUN_SECRET"


class EncoderProcess:
    def __init__(
        self, model_path: Path | str, port: int, *options: str, environment: dict[str, str] | None = None
    ) -> None:
        self.place = f"127.0.0.1:{port}"
        command = [sys.executable, "-m", "waybill.launch.command_line", "encode", "--model", str(model_path)]
        self._process = subprocess.Popen(
            [*command, "--port", str(port), *options],
            env=(environment or os.environ) | {VARIABLE: SECRET, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self) -> None:
        assert self._process.stderr is not None
        lines = []
        for line in self._process.stderr:
            lines.append(line)
            if line.startswith("encoding images at"):
                return
        raise AssertionError("".join(lines))

    def stop(self, number: int = signal.SIGKILL) -> None:
        self._process.send_signal(number)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stderr is not None
        self._process.stderr.close()


@contextmanager
def run_encoder(model_path: Path, *options: str, port: int | None = None) -> Iterator[EncoderProcess]:
    encoder = EncoderProcess(model_path, free_port() if port is None else port, *options)
    try:
        encoder.wait_until_ready()
        yield encoder
    finally:
        encoder.close()
