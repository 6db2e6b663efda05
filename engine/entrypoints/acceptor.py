"""Takes connections from a listening socket, no more than there is room for.

asyncio's own server takes as many as it is offered; without a free file descriptor it tries, and logs, once for every
connection that waits, every second.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable
from contextlib import suppress

logger = logging.getLogger(__name__)

# The listening socket is of no use any more. Whatever else `accept` says - no room, a network or a firewall - may pass.
BROKEN = (errno.EBADF, errno.EINVAL, errno.ENOTSOCK, errno.EOPNOTSUPP)
RETRY_S = 1.0
# So many are taken before anything else has its turn.
BATCH = 64

Released = Callable[[], None]


def send_at_once(connection: socket.socket) -> None:
    """A token's chunk does not wait until the caller has acknowledged the one before, which takes up to 40 ms. asyncio sees
    to that only where the listening socket was made with the number of its protocol, and `create_server` gives none."""
    if connection.family in (socket.AF_INET, socket.AF_INET6):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class Acceptor:
    """`make_protocol` makes a connection's protocol, which calls what it is given once it is lost. Further connections wait
    in the kernel's queue, where they cost this process nothing."""

    def __init__(
        self, listener: socket.socket, make_protocol: Callable[[Released], asyncio.Protocol], max_open: int
    ) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._make_protocol = make_protocol
        self._max_open = max_open
        self._room = asyncio.Semaphore(max_open)
        self._released = asyncio.Event()
        self._opening: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Until cancelled.

        Raises:
            OSError: the listening socket is broken.
        """
        num_taken = 0
        while True:
            if self._room.locked():
                logger.warning("all of %d connections are open: further ones wait", self._max_open)
            await self._room.acquire()
            connection = await self._accept()
            task = asyncio.create_task(self._open(connection), name="open connection")
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)
            num_taken += 1
            if num_taken % BATCH == 0:
                await asyncio.sleep(0)

    async def _accept(self) -> socket.socket:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._listener)
            except ConnectionAbortedError:
                continue
            except OSError as error:
                if error.errno in BROKEN:
                    raise
                logger.warning("no connection can be taken: %s", error.strerror)
                self._released.clear()
                # The room may come from elsewhere, of which nobody tells us.
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._released.wait(), RETRY_S)
                continue
            send_at_once(connection)
            return connection

    async def _open(self, connection: socket.socket) -> None:
        is_open = True

        def release() -> None:
            nonlocal is_open
            if is_open:
                is_open = False
                self._room.release()
                self._released.set()

        protocol = self._make_protocol(release)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: protocol, connection)
        except OSError as error:
            logger.warning("a connection cannot be served: %s", error.strerror)
            connection.close()
            release()
