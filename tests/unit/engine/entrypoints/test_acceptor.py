"""What `accept` may say of one connection, and of the listening socket."""

from __future__ import annotations

import asyncio
import errno
import socket

import pytest

from waybill.engine.entrypoints import acceptor
from waybill.engine.entrypoints.acceptor import Acceptor


def accept_after(monkeypatch: pytest.MonkeyPatch, number: int) -> socket.socket:
    """The connection that comes after `accept` has failed once with this error."""
    monkeypatch.setattr(acceptor, "RETRY_S", 0.01)
    ours, theirs = socket.socketpair()

    async def run() -> socket.socket:
        outcomes = iter([OSError(number, "a reason"), (ours, None)])

        async def sock_accept(listener: socket.socket) -> tuple[socket.socket, None]:
            outcome = next(outcomes)
            if isinstance(outcome, OSError):
                raise outcome
            return outcome  # type: ignore[return-value]

        monkeypatch.setattr(asyncio.get_running_loop(), "sock_accept", sock_accept)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            return await Acceptor(listener, lambda release: asyncio.Protocol(), 4)._accept()

    with ours, theirs:
        return asyncio.run(run())


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM, errno.EPROTO, errno.EPERM, errno.ENETUNREACH])
def test_what_passes_ends_nothing(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    assert isinstance(accept_after(monkeypatch, number), socket.socket)


def test_a_broken_listening_socket_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="a reason"):
        accept_after(monkeypatch, errno.EBADF)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_what_is_written_is_sent_at_once(address: str) -> None:
    """Else a stream's next token waits for the caller's acknowledgement of the last one, some 40 ms."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET

    async def run() -> int:
        opened: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        class Protocol(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                connection = transport.get_extra_info("socket")
                opened.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

        with socket.create_server((address, 0), family=family) as listener:
            accepting = asyncio.create_task(Acceptor(listener, lambda release: Protocol(), 4).run())
            with socket.create_connection(listener.getsockname()[:2]):
                found = await opened
            accepting.cancel()
            return found

    assert asyncio.run(run()) == 1
