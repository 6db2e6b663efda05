"""The folder of a run on a node: sockets, FIFOs, configuration and log files; gone when the run is.

Who makes it - torchrun's agent, or the calling program - holds a lock on it, and removes it at the end. Where nobody could,
because everything was killed at once, the lock is free, and the next run of the same user removes it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import TypeVar

import msgspec

T = TypeVar("T")

ENGINE_CONFIG = "engine.json"
OUTPUT_PROCESSOR_CONFIG = "output_processor.json"
ROLLOUT_OPTIONS = "rollout.json"
SERVE_OPTIONS = "serve.json"
ADDRESSES = "addresses.json"
# The temporary folder of the run's processes, within its own.
TEMPORARY = "tmp"

# Made by the rank that says why the command cannot be done, and the status of those that end for it.
REFUSAL = "refusal"
EXIT_USAGE = 2

PREFIX = "waybill-run-"
# Who writes into the folder while it is removed, as its last act, is outlasted.
REMOVAL_ATTEMPTS = 5


class RunDir:
    """A new folder under the system's temporary one, open to its owner alone, and this process' lock on it."""

    def __init__(self) -> None:
        remove_stale_run_dirs()
        self.path, self._lock = make_locked_folder()

    def remove(self) -> None:
        """May be called again."""
        remove_run_dir(self.path)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def is_first_to_refuse(run_dir: str) -> bool:
    """Of a node's ranks one says why they cannot begin."""
    try:
        (Path(run_dir) / REFUSAL).touch(exist_ok=False)
    except OSError:
        # Another one has, or has been so quick to that the folder is gone.
        return False
    return True


def make_locked_folder() -> tuple[str, int]:
    """Another process that starts may take the folder for a stale one before it is locked; then it is made again."""
    while True:
        path = tempfile.mkdtemp(prefix=PREFIX)
        lock = lock_folder(path)
        if lock is not None:
            if Path(path).exists():
                return path, lock
            os.close(lock)


def lock_folder(path: str | Path) -> int | None:
    """A descriptor that holds the lock; None where somebody else does, or there is no such folder of this user's."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    try:
        if os.fstat(descriptor).st_uid == os.geteuid():
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
    except BlockingIOError:
        pass
    os.close(descriptor)
    return None


def remove_stale_run_dirs() -> None:
    """Folders of this user's runs of which no process is left to remove them."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        lock = lock_folder(path)
        if lock is not None:
            remove_run_dir(str(path))
            os.close(lock)


def remove_run_dir(path: str) -> None:
    """Remove it; may be called by whoever notices first that the run is over."""
    for _ in range(REMOVAL_ATTEMPTS):
        shutil.rmtree(path, ignore_errors=True)
        if not Path(path).exists():
            return


def agent_lifeline(run_dir: str) -> str:
    """The FIFO that torchrun's agent holds for the ranks of its node."""
    return f"{run_dir}/agent.alive"


def caller_lifeline(run_dir: str) -> str:
    """The FIFO that a calling program holds for the agent and the ranks."""
    return f"{run_dir}/caller.alive"


def write_struct(run_dir: str, name: str, value: msgspec.Struct) -> Path:
    file = Path(run_dir) / name
    file.write_bytes(msgspec.json.encode(value))
    return file


def read_struct(run_dir: str, name: str, struct_type: type[T]) -> T:
    return msgspec.json.decode((Path(run_dir) / name).read_bytes(), type=struct_type)
