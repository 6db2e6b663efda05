"""Who may connect to the sockets of collectives."""

from __future__ import annotations

import os
import socket
import subprocess

import pytest
import torch.distributed as dist

from waybill.parallel.collective_sockets import (
    TCP_ESTABLISHED,
    TCP_LISTEN,
    TcpSocket,
    address_towards,
    check_whose_connections,
    has_other_users,
    listening_sockets,
    take_in_nobody_else,
)

OURS, OTHERS, INODE = 1000, 1001, 77
HERE, THERE = "0100007F:A02F", "0100007F:B001"
# Another user's shell, which need not find its way to this Python.
STRANGER = ("setpriv", "--reuid", "65534", "--clear-groups", "bash", "-c")


def table(owner: int | None) -> list[TcpSocket]:
    """A listening socket, a connection to it whose other end is `owner`'s (None: not on this host), and others."""
    sockets = [
        TcpSocket(HERE, "00000000:0000", TCP_LISTEN, OURS, INODE),
        TcpSocket(HERE, THERE, TCP_ESTABLISHED, OURS, 0),
        # The same port at another address is no business of ours, and neither is another's connection.
        TcpSocket("0200000A:A02F", "0300000A:01BB", TCP_ESTABLISHED, OURS, 5),
        TcpSocket("0100007F:1111", "0100007F:2222", TCP_ESTABLISHED, OTHERS, 6),
        # Over, or not yet there.
        TcpSocket(HERE, "0100007F:3333", "06", 0, 0),
    ]
    return sockets if owner is None else [*sockets, TcpSocket(THERE, HERE, TCP_ESTABLISHED, owner, 8)]


@pytest.mark.parametrize(("owner", "strange"), [(OURS, False), (OTHERS, True), (None, True)])
def test_whose_a_connection_is(owner: int | None, strange: bool) -> None:
    assert has_other_users(table(owner), {INODE}, OURS) is strange
    assert not has_other_users(table(owner), {INODE + 1}, OURS)


def test_a_sealed_listener_keeps_who_is_in_and_takes_nobody_else() -> None:
    before = listening_sockets()
    device = dist.ProcessGroupGloo.create_device(interface="lo")
    listeners = listening_sockets() - before
    assert len(listeners) == 1
    with socket.socket(fileno=os.dup(next(iter(listeners)))) as own:
        host, port = own.getsockname()
    assert host == "127.0.0.1"
    with socket.create_connection((host, port), timeout=5) as first:
        take_in_nobody_else(listeners)
        with pytest.raises(TimeoutError):
            socket.create_connection((host, port), timeout=0.5)
        first.settimeout(0.2)
        with pytest.raises(TimeoutError):
            first.recv(1)
    assert listening_sockets() - before == listeners, "the socket itself stays: gloo closes it"
    del device


def test_a_kernel_that_takes_no_filter_is_no_reason_not_to_start(caplog: pytest.LogCaptureFixture) -> None:
    """As where its memory for filters is used up. Here: a filter that is locked."""
    so_lock_filter = 44
    with socket.create_server(("127.0.0.1", 0)) as listener:
        take_in_nobody_else([listener.fileno()])
        listener.setsockopt(socket.SOL_SOCKET, so_lock_filter, 1)
        take_in_nobody_else([listener.fileno()])
    assert "can still connect" in caplog.text


def test_only_sockets_that_listen_on_tcp_are_counted() -> None:
    before = listening_sockets()
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()),
        socket.socket(),
    ):
        assert listening_sockets() - before == {server.fileno()}
    assert listening_sockets() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_another_user_who_has_connected_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        check_whose_connections([server.fileno()])
        command = [*STRANGER, f"exec 3<>/dev/tcp/127.0.0.1/{server.getsockname()[1]}; echo in; read"]
        stranger = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/")
        assert stranger.stdout is not None and stranger.stdout.readline() == b"in\n"
        with pytest.raises(RuntimeError, match="another user of this host has connected"):
            check_whose_connections([server.fileno()])
        stranger.communicate()


def test_the_address_towards_a_host() -> None:
    assert address_towards("127.0.0.1", 1) == "127.0.0.1"
    with pytest.raises(socket.gaierror):
        address_towards("no.such.host.invalid", 1)
