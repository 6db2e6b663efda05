"""An engine whose leaders log when they commit their steps."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import psutil
import tapped_worker
from step_log import StepEntry, StepLogReader, log_file

from waybill import Engine
from waybill.launch import supervisor

WORKER_MODULE = ["-m", supervisor.PROCESS, "waybill.launch.worker"]


class TappedEngine:
    """`engine` is an ordinary one, but for what torchrun starts as its ranks."""

    def __init__(self, model_path: str, *, dp_size: int, with_inline: bool = False, **options: Any) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="waybill-bench-")
        os.environ[tapped_worker.LOG_FOLDER] = self._folder.name
        os.environ[tapped_worker.WITH_INLINE] = str(int(with_inline))
        agent_command = supervisor.agent_command
        supervisor.agent_command = lambda *args, **kwargs: tap(agent_command(*args, **kwargs))
        try:
            self.engine = Engine(model_path, dp_size=dp_size, **options)
        finally:
            supervisor.agent_command = agent_command
        self._readers = [StepLogReader(log_file(self._folder.name, dp_rank)) for dp_rank in range(dp_size)]
        self.state: dict[str, Any] = {}
        self._processor: psutil.Process | None = None

    def take_steps(self) -> list[list[StepEntry]]:
        """The steps of each leader since the last call; `state` is the engine's at this moment."""
        self.state = self.engine.get_server_info()
        return [reader.take() for reader in self._readers]

    def processor_cpu_s(self) -> float:
        """CPU seconds that the output processor has used."""
        if self._processor is None:
            self._processor = find_process(self.engine.run_dir, "waybill.engine.output.output_processor")
        times = self._processor.cpu_times()
        return times.user + times.system

    def close(self) -> None:
        self.engine.shutdown()
        self._folder.cleanup()


def find_process(run_dir: str, module: str) -> psutil.Process:
    """The engine's process that runs a module."""
    for process in psutil.Process().children(recursive=True):
        try:
            command = process.cmdline()
        except psutil.NoSuchProcess:
            # It has ended meanwhile, as zombies have.
            continue
        if module in command and any(run_dir in argument for argument in command):
            return process
    raise RuntimeError(f"no process of {run_dir} runs {module}")


def tap(command: list[str]) -> list[str]:
    """The agent's command with the tapped worker in place of the engine's own."""
    at = command.index(WORKER_MODULE[-1]) - 2
    assert command[at : at + 3] == WORKER_MODULE
    return [*command[:at], str(Path(tapped_worker.__file__).resolve()), *command[at + 3 :]]
