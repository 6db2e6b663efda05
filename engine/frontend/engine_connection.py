"""The frontend's sockets to the engine, and the tasks that receive from them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from ..io_struct import OutputBatch
from ..ipc.curve import CurveGuard
from ..ipc.frontend_messages import BackendMessage, FrontendMessage
from ..ipc.output_queries import OutputReply
from ..ipc.sockets import AsyncReceiver, Endpoint, Sender, open_socket
from .leader_link import LeaderLink
from .pending_replies import PendingReplies

logger = logging.getLogger(__name__)


class EngineDeadError(RuntimeError):
    """The engine's processes have ended; the message says what is known of why."""


class EngineStartError(RuntimeError):
    """The engine refused to start, and says why."""


class EngineConnection:
    """Connects to the leaders (`link`) and the output processors (`query_sockets`), and binds where outputs arrive. A reply
    of either goes to whoever waits for it in `replies`."""

    def __init__(
        self,
        *,
        leaders: Sequence[Endpoint | str],
        frontend: Endpoint | str,
        queries: Sequence[Endpoint | str],
    ) -> None:
        self._context = zmq.asyncio.Context()
        # The sender never blocks and is used on the loop alone; a plain context serves.
        self._plain_context = zmq.Context()
        senders: list[Sender[FrontendMessage]] = [Sender(self._plain_context, leader) for leader in leaders]
        self.link = LeaderLink(senders)
        self._guard = CurveGuard(self._context, [frontend])
        self._inbox: AsyncReceiver[BackendMessage] = AsyncReceiver(self._context, frontend, BackendMessage)
        # One for each output processor.
        self.query_sockets = [open_socket(self._context, zmq.DEALER, where, bind=False) for where in queries]
        self.replies = PendingReplies()
        self._tasks: list[asyncio.Task[None]] = []

    def start(
        self, *, on_outputs: Callable[[OutputBatch, list[memoryview]], None], on_failure: Callable[[str], None]
    ) -> None:
        """Begin to receive, on the running loop. `on_failure` is told when a task that receives has failed: nothing comes
        back any more."""

        def on_end(task: asyncio.Task[None]) -> None:
            if task.cancelled():
                # By `close`.
                return
            reason = f"the frontend's task {task.get_name()!r} has failed: {task.exception()!r}"
            logger.critical(reason, exc_info=task.exception())
            on_failure(reason)

        self._tasks = [
            asyncio.create_task(self._receive_outputs(on_outputs), name="receive outputs"),
            *(asyncio.create_task(self._receive_replies(one), name="receive replies") for one in self.query_sockets),
        ]
        for task in self._tasks:
            task.add_done_callback(on_end)

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        self.link.close(1.0)
        self._inbox.close()
        for socket in self.query_sockets:
            socket.close(linger=0)
        self._guard.close()
        self._context.destroy(linger=0)
        self._plain_context.term()

    async def _receive_outputs(self, on_outputs: Callable[[OutputBatch, list[memoryview]], None]) -> None:
        while True:
            message, frames = await self._inbox.receive()
            if isinstance(message, OutputBatch):
                on_outputs(message, frames)
            else:
                self.replies.resolve(message.op_id, message)

    async def _receive_replies(self, socket: Any) -> None:
        decoder: msgspec.msgpack.Decoder[OutputReply] = msgspec.msgpack.Decoder(OutputReply)
        while True:
            head, *frames = await socket.recv_multipart()
            reply = decoder.decode(head)
            self.replies.resolve(reply.op_id, (reply, frames))
