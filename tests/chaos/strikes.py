"""Faults that a run may die of: each is done to a fresh run at some moment, and says what must come of it."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from .hostile_frames import internal_sockets, send_to_internal
from .service import Service

MIB = 1 << 20
NUM_PORT_CONNECTIONS = 30
# A calling program may be stopped at a terminal: its engine waits for it.
NOT_MISSED = ("caller",)


@dataclass(frozen=True)
class Struck:
    """What was done. `ends_run`: the run must end by itself; otherwise it may also go on, but rightly. `release` takes
    the fault back as far as it can be."""

    what: str
    ends_run: bool
    release: Callable[[], None] = lambda: None


Strike = Callable[[Service, random.Random, str], Struck]


def kill(service: Service, choose: random.Random, role: str) -> Struck:
    service.place.process(role).kill()
    return Struck(f"SIGKILL to {role}", ends_run=True)


def stop(service: Service, choose: random.Random, role: str) -> Struck:
    process = service.place.process(role)
    process.send_signal(signal.SIGSTOP)
    return Struck(f"SIGSTOP to {role}", role not in NOT_MISSED, lambda: wake(process))


def wake(process: psutil.Process) -> None:
    try:
        process.send_signal(signal.SIGCONT)
    except psutil.NoSuchProcess:
        # It has been ended meanwhile.
        return


def frame(service: Service, choose: random.Random, role: str) -> Struck:
    """One malformed message to one of the run's own sockets."""
    run_dir = service.place.run_dir
    name = choose.choice(internal_sockets(run_dir))
    context, what = send_to_internal(run_dir, name, choose)
    return Struck(f"to socket {name}: {what}", ends_run=False, release=lambda: context.destroy(linger=0))


def memory_limit(service: Service, choose: random.Random, role: str) -> Struck:
    """What the process may map from now on is little."""
    process = service.place.process(role)
    spare = choose.choice((0, 1, 8, 64)) * MIB
    restore = limit(process, resource.RLIMIT_AS, process.memory_info().vms + spare)
    return Struck(f"{role} may map {spare // MIB} MiB more", ends_run=False, release=restore)


def descriptor_limit(service: Service, choose: random.Random, role: str) -> Struck:
    process = service.place.process(role)
    spare = choose.choice((0, 0, 1, 4))
    restore = limit(process, resource.RLIMIT_NOFILE, process.num_fds() + spare)
    return Struck(f"{role} may open {spare} files more", ends_run=False, release=restore)


def limit(process: psutil.Process, which: int, value: int) -> Callable[[], None]:
    """Lower a limit; returns what restores it."""
    before = process.rlimit(which)
    process.rlimit(which, (value, before[1]))

    def restore() -> None:
        try:
            process.rlimit(which, before)
        except psutil.NoSuchProcess:
            # It has died of it.
            return

    return restore


def memory_cut(service: Service, choose: random.Random, role: str) -> Struck:
    """Shared memory is taken away under whoever has mapped it: the ring of routes, or the table of heartbeats."""
    name = choose.choice(("waybill-route-ring", "waybill-heartbeats"))
    process = service.place.process("rank 0")
    for fd in Path(f"/proc/{process.pid}/fd").iterdir():
        # Others of its files may be closed meanwhile.
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(fd).startswith(f"/memfd:{name}"):
                os.truncate(fd, 0)
                return Struck(f"{name} cut to nothing", ends_run=False)
    return Struck(f"{name} is not there", ends_run=False)


def ports(service: Service, choose: random.Random, role: str) -> Struck:
    """Connections to every port that a process of the run listens on, but for HTTP, with noise or in silence."""
    roles = [name for name in service.place.processes() if name != "frontend"]
    sockets: list[socket.socket] = []
    found = set()
    for name in roles:
        for each in service.place.process(name).net_connections("tcp"):
            if each.status == psutil.CONN_LISTEN:
                found.add((each.laddr.ip, each.laddr.port))
    for address in found:
        for _ in range(NUM_PORT_CONNECTIONS):
            sockets.append(connect(address, choose))
    what = f"{len(sockets)} connections to {len(found)} ports of the ranks and the store"
    return Struck(what, ends_run=False, release=lambda: close_all(sockets))


def close_all(sockets: list[socket.socket]) -> None:
    for each in sockets:
        each.close()


def connect(address: tuple[str, int], choose: random.Random) -> socket.socket:
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    each = socket.socket(family)
    each.settimeout(0.5)
    try:
        each.connect(address)
        if choose.random() < 0.7:
            each.sendall(choose.randbytes(choose.choice((1, 8, 100, 5000))))
    except OSError:
        # Refusing is a good answer.
        pass
    return each


def full_disk(service: Service, choose: random.Random, role: str) -> Struck:
    """The run's temporary folder, which is a small file system of its own, has no byte left."""
    file = service.place.folder / "filling"
    try:
        with file.open("wb", buffering=0) as handle:
            while True:
                handle.write(b"\0" * 65536)
    except OSError:
        pass
    return Struck("no space left in $TMPDIR", ends_run=False, release=lambda: file.unlink(missing_ok=True))


def thread_limit(service: Service, choose: random.Random, role: str) -> Struck:
    """Where the run belongs to a user without privileges: it may start no process and no thread more."""
    process = service.place.process(role)
    user = process.uids().real
    used = sum(each.num_threads() for each in psutil.process_iter() if each.uids().real == user)
    restore = limit(process, resource.RLIMIT_NPROC, used)
    return Struck(f"{role} may start no thread more", ends_run=False, release=restore)


STRIKES: dict[str, Strike] = {
    "kill": kill,
    "stop": stop,
    "frame": frame,
    "memory limit": memory_limit,
    "descriptor limit": descriptor_limit,
    "memory cut": memory_cut,
    "ports": ports,
    "full disk": full_disk,
    "thread limit": thread_limit,
}
