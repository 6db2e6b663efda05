"""What another user of the host can reach of a server on one node: its HTTP port, and nothing else."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
from support.server_process import ServerProcess

TIMEOUT_S = 60.0
# Each is tried so often, by clients that say nothing and by such that say something.
NUM_UNAUTHENTICATED = 200
PATIENCE_S = 0.02
PROMPT = {
    "input_ids": list(range(3, 23)),
    "sampling_params": {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True},
}


def everything(server: ServerProcess) -> list[psutil.Process]:
    return [psutil.Process(server.process.pid), *server.descendants()]


def listeners(server: ServerProcess) -> dict[tuple[str, int], psutil.Process]:
    """Addresses on TCP at which something of the server listens."""
    return {
        tuple(connection.laddr): process
        for process in everything(server)
        for connection in process.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    }


def test_only_the_http_port_takes_connections(server: ServerProcess) -> None:
    """The ranks' collectives listen on loopback, and take nobody in any more."""
    url = urlsplit(server.url)
    found = listeners(server)
    assert (url.hostname, url.port) in found
    assert not any(process.net_connections(kind="udp") for process in everything(server))
    before = rank_connections(server)
    expected = httpx.post(f"{server.url}/generate", json=PROMPT, timeout=TIMEOUT_S).json()["output_ids"]
    for (host, port), process in found.items():
        assert host == "127.0.0.1"
        if port == url.port:
            continue
        assert "waybill.launch.worker" in process.cmdline(), f"{process.cmdline()} listens on {host}:{port}"
        knock(host, port)
    assert httpx.post(f"{server.url}/generate", json=PROMPT, timeout=TIMEOUT_S).json()["output_ids"] == expected
    assert rank_connections(server) == before, "a client holds a connection to a rank"


def rank_connections(server: ServerProcess) -> set[tuple[int, int]]:
    """Every socket on TCP that a rank has: process and descriptor."""
    return {
        (process.pid, connection.fd)
        for process in everything(server)
        if "waybill.launch.worker" in process.cmdline()
        for connection in process.net_connections(kind="tcp")
    }


def knock(host: str, port: int) -> None:
    """Nobody is let in, however many come at once."""
    clients = [socket.socket() for _ in range(NUM_UNAUTHENTICATED)]
    for client in clients:
        client.setblocking(False)
        client.connect_ex((host, port))
    try:
        first, second = clients[0], clients[-1]
        for client in (first, second):
            client.settimeout(PATIENCE_S)
            try:
                client.sendall(b"\0" * 8)
                raise AssertionError(f"{host}:{port} has taken a client in")
            except (BlockingIOError, TimeoutError, BrokenPipeError):
                pass
    finally:
        for client in clients:
            client.close()


def test_sockets_and_files_of_a_run_are_its_owners_alone(server: ServerProcess) -> None:
    words = [word for process in everything(server) for word in process.cmdline()]
    (run_dir,) = {Path(words[at + 1]) for at, word in enumerate(words) if word == "--run-dir"}
    assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700 and run_dir.stat().st_uid == os.geteuid()
    assert any(stat.S_ISSOCK(path.stat().st_mode) for path in run_dir.iterdir())
    # torch's store, by which the ranks have met, is among them.
    assert (run_dir / "store").is_file()
    unix = {
        connection.laddr
        for process in everything(server)
        for connection in process.net_connections(kind="unix")
        if connection.laddr
    }
    assert unix and all(str(address).startswith(f"{run_dir}/") for address in unix)
