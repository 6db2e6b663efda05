"""The way to a trainer's store, which may be anything: nothing there, something else, or something that never answers."""

from __future__ import annotations

import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..ipc.critical_thread import start_critical_thread

LISTENER_POLL_S = 0.1
CUT_INTERVAL_S = 0.5


def wait_for_listener(address: str, port: int, timeout_s: float) -> None:
    """A store's own attempts to connect take up to twice the time that it is given.

    Raises:
        RuntimeError: nobody listens there in time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with socket.create_connection((address, port), timeout=max(0.1, deadline - time.monotonic())):
                return
        except OSError as error:
            if time.monotonic() + LISTENER_POLL_S > deadline:
                raise RuntimeError(f"nobody listens on {address}:{port} after {timeout_s} s ({error})") from None
        time.sleep(LISTENER_POLL_S)


@contextmanager
def cut_off_after(timeout_s: float, address: str, port: int) -> Iterator[None]:
    """Bound what is done in this block with a store at `address`: torch waits for ever for a peer that takes a connection
    and says nothing. When the time is over all connections to it are shut down, and whoever waits for one fails."""
    left = threading.Event()

    def watch() -> None:
        if not left.wait(timeout_s):
            peers = addresses_of(address)
            while not left.wait(CUT_INTERVAL_S):
                shut_down_connections(peers, port)

    thread = start_critical_thread(watch, f"bound of {address}:{port}")
    try:
        yield
    finally:
        left.set()
        thread.join()


def addresses_of(host: str) -> frozenset[str]:
    try:
        return frozenset(str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM))
    except OSError:
        return frozenset()


def shut_down_connections(peers: frozenset[str], port: int) -> None:
    """Those of this process to a port of any of these addresses."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as each:
                if each.family in (socket.AF_INET, socket.AF_INET6) and is_peer(each.getpeername(), peers, port):
                    each.shutdown(socket.SHUT_RDWR)
        except OSError:
            # Closed since, or not connected.
            continue


def is_peer(name: tuple[str, int], peers: frozenset[str], port: int) -> bool:
    return name[1] == port and name[0].removeprefix("::ffff:") in peers
