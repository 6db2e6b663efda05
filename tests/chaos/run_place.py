"""Where one run of a service lives: a temporary folder of its own, and a mark in the environment of every process of it."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from support.server_process import FEW_SHAPES

from waybill.launch.supervisor import PROCESS

MARK = "WAYBILL_CHAOS_RUN"
SHARED_MEMORY = Path("/dev/shm")
POLL_S = 0.05
# Of a folder that may become full.
DISK_BYTES = 4 << 20
# A user without privileges, to whom limits of threads apply.
NOBODY = 65534
# An interpreter in a home folder may run as another user and yet not start again.
STARTS_ANOTHER = "import subprocess, sys, torch, waybill; subprocess.run([sys.executable, '-c', ''], check=True)"
AS_NOBODY = ("setpriv", f"--reuid={NOBODY}", "--clear-groups")
# torch keeps it for later runs of the same user: nothing that a run leaves.
TORCH_CACHE = {"TORCHINDUCTOR_CACHE_DIR": f"{tempfile.gettempdir()}/torchinductor_chaos_{os.getuid()}"}
ROLES = {
    "waybill.engine.output.output_processor": "output processor",
    "waybill.launch.frontend": "frontend",
    "waybill.launch.command_line": "agent",
    "waybill.launch.agent": "agent",
    "chaos.engine_program": "caller",
}


class RunPlace:
    """Finds what belongs to a run, whoever started it, and what it leaves behind."""

    def __init__(self, *, small_disk: bool = False, unprivileged: bool = False) -> None:
        # Short: the path of a unix socket has 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="wc-"))
        self._is_mounted = small_disk
        if small_disk:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(self.folder)], check=True)
        if unprivileged:
            os.chown(self.folder, NOBODY, NOBODY)
        # How the service's first process is started.
        self.prefix = AS_NOBODY if unprivileged else ()
        self._mark = secrets.token_hex(8)
        self._shared_before = set(os.listdir(SHARED_MEMORY))

    @property
    def environment(self) -> dict[str, str]:
        """That of the service's first process."""
        return os.environ | FEW_SHAPES | TORCH_CACHE | {"TMPDIR": str(self.folder), MARK: self._mark}

    @property
    def run_dir(self) -> Path:
        """The folder that the run made for its sockets."""
        (found,) = [path for path in self.folder.glob("waybill-*") if (path / "frontend").exists()]
        return found

    def processes(self) -> dict[str, psutil.Process]:
        """The living ones, by what they are: "agent", "rank 0", "output processor", "frontend", "caller"."""
        found = {}
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found[role_of(process)] = process
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def process(self, role: str) -> psutil.Process:
        """
        Raises:
            psutil.NoSuchProcess: there is none.
        """
        processes = self.processes()
        if role not in processes:
            raise psutil.NoSuchProcess(0, role)
        return processes[role]

    def leftovers(self) -> list[str]:
        """Processes, files in the temporary folder and names in shared memory."""
        files = [f"$TMPDIR/{path.name}" for path in self.folder.iterdir()]
        own = self.processes()
        shared = [
            f"{SHARED_MEMORY}/{name}"
            for name in set(os.listdir(SHARED_MEMORY)) - self._shared_before
            if not is_of_others(name, {process.pid for process in own.values()})
        ]
        return [*own, *files, *shared]

    def wait_until_empty(self, timeout_s: float) -> list[str]:
        """What is still there after that time."""
        deadline = time.monotonic() + timeout_s
        while (left := self.leftovers()) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return left

    def clean_up(self) -> None:
        """End what is left, by its process id, and remove the folder."""
        for process in self.processes().values():
            process.kill()
        if self._is_mounted:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def is_of_others(name: str, own: set[int]) -> bool:
    """Whether a name in shared memory belongs to a living process of another run on this machine: it has it mapped or, with
    OpenMP's, is named by it."""
    openmp = re.fullmatch(r"__KMP_REGISTERED_LIB_(\d+)_\d+", name)
    if openmp is not None and int(openmp[1]) not in own:
        return psutil.pid_exists(int(openmp[1]))
    path = str(SHARED_MEMORY / name)
    for process in psutil.process_iter():
        if process.pid not in own:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if any(found.path == path for found in process.memory_maps()):
                    return True
    return False


def may_mount() -> bool:
    """Whether a folder can be a file system of its own."""
    return os.geteuid() == 0 and succeeds("unshare", "--mount", "true")


def may_change_user() -> bool:
    """Whether a service can belong to a user without privileges, who can read the interpreter and its packages."""
    return os.geteuid() == 0 and succeeds(*AS_NOBODY, sys.executable, "-c", STARTS_ANOTHER)


def succeeds(*command: str) -> bool:
    if shutil.which(command[0]) is None:
        return False
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def role_of(process: psutil.Process) -> str:
    words = process.cmdline()
    modules = [words[i + 1] for i, word in enumerate(words[:-1]) if word in ("-m", PROCESS)]
    module = modules[-1] if modules else ""
    if module == "waybill.launch.worker":
        return f"rank {process.environ()['RANK']}"
    return ROLES.get(module, f"{process.name()} {process.pid}")
