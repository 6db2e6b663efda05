"""Answers claims, and questions for counters and the load of experts, on a ROUTER socket: the frontend's, and those of any
program of this user that fetches rows without HTTP. What such a program sends is answered or dropped; none of it ends the
thread.

A `DEALER` sends one frame, a `REQ` socket an empty one before it; the answer has the same form. Limits: a question has at
most `MAX_QUERY_BYTES` (libzmq closes the connection of a longer one); answers that a peer does not read are bounded in
number by the socket and in bytes here. Rows are sent without a copy, so unread answers hold no memory but the rows'.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from ..ipc.output_queries import ClaimReply, CountersReply, FetchClaimReq, GetCountersReq, OutputQuery, OutputReply
from ..ipc.sockets import Endpoint, open_socket
from ..routing.claims import ClaimError, ClaimStore
from .expert_load import ExpertLoad

logger = logging.getLogger(__name__)

MAX_QUERY_BYTES = 4096
# Questions that wait here, and answers that wait to be read; of one peer.
MAX_WAITING_QUERIES = 1000
MAX_UNREAD_REPLIES = 1000


class UnreadReplies:
    """Bytes of rows on their way to peers, who may never read them. A tracker says when libzmq is done with its message."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._sent: deque[tuple[zmq.MessageTracker, int]] = deque()
        self._num_bytes = 0

    def has_room(self, num_bytes: int) -> bool:
        """Whether that many more may be sent; a reply alone always may."""
        self._sent = deque((tracker, size) for tracker, size in self._sent if not tracker.done)
        self._num_bytes = sum(size for _, size in self._sent)
        return self._num_bytes == 0 or self._num_bytes + num_bytes <= self._max_bytes

    def add(self, tracker: zmq.MessageTracker, num_bytes: int) -> None:
        if num_bytes:
            self._sent.append((tracker, num_bytes))


class QueryServer:
    """`serve` is the thread's body; `max_unread_bytes` bounds the rows of answers that nobody has read yet."""

    def __init__(
        self,
        context: zmq.Context[Any],
        where: Endpoint | str,
        claims: ClaimStore,
        counters: Callable[[], dict[str, int]],
        expert_load: ExpertLoad,
        max_unread_bytes: int,
    ) -> None:
        limits: dict[int, int] = {
            zmq.MAXMSGSIZE: MAX_QUERY_BYTES,
            zmq.RCVHWM: MAX_WAITING_QUERIES,
            zmq.SNDHWM: MAX_UNREAD_REPLIES,
            # A reply that cannot be sent is an error here, and not silently lost.
            zmq.ROUTER_MANDATORY: 1,
        }
        self._socket = open_socket(context, zmq.ROUTER, where, bind=True, options=limits)
        self._claims = claims
        self._counters = counters
        self._expert_load = expert_load
        self._unread = UnreadReplies(max_unread_bytes)
        self._decoder: msgspec.msgpack.Decoder[OutputQuery] = msgspec.msgpack.Decoder(OutputQuery)
        self._encoder = msgspec.msgpack.Encoder()
        self.num_malformed = 0
        self.num_undelivered = 0

    def serve(self) -> None:
        """Forever."""
        while True:
            self.answer(self._socket.recv_multipart())

    def answer(self, frames: list[bytes]) -> None:
        """One message of a peer: its identity and what it sent."""
        identity, *parts = frames
        envelope = [identity]
        if len(parts) > 1 and parts[0] == b"":
            envelope.append(parts.pop(0))
        try:
            reply, rows = self._reply(self._decode(parts))
        except ValueError as error:
            self.num_malformed += 1
            logger.warning("a malformed question was refused: %s", error)
            reply, rows = ClaimReply("", error=str(error)), []
        self._send(envelope, reply, rows)

    def _decode(self, parts: list[bytes]) -> OutputQuery:
        """
        Raises:
            ValueError: it is no question.
        """
        if len(parts) != 1:
            raise ValueError(f"a question is one frame, {len(parts)} came")
        try:
            return self._decoder.decode(parts[0])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"not a question (fetch_claim, get_counters or get_expert_load): {error}") from error

    def _reply(self, query: OutputQuery) -> tuple[OutputReply, list[bytes | memoryview]]:
        if isinstance(query, GetCountersReq):
            counters = self._counters() | {
                "queries_malformed": self.num_malformed,
                "query_replies_undelivered": self.num_undelivered,
            }
            return CountersReply(query.op_id, counters), []
        if not isinstance(query, FetchClaimReq):
            return self._expert_load.take(query.op_id), []
        try:
            routed = self._claims.get(query.claim)
        except ClaimError as error:
            return ClaimReply(query.op_id, error=str(error)), []
        if not self._unread.has_room(routed.rows.nbytes):
            return ClaimReply(
                query.op_id, error="too many replies wait to be read; fetch it again later", is_busy=True
            ), []
        return ClaimReply(query.op_id, meta=routed.meta), [routed.frame]

    def _send(self, envelope: list[bytes], reply: OutputReply, rows: list[bytes | memoryview]) -> None:
        frames = [*envelope, self._encoder.encode(reply), *rows]
        try:
            tracker = self._socket.send_multipart(frames, zmq.NOBLOCK, copy=False, track=True)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            self.num_undelivered += 1
            logger.warning("an answer was dropped, its peer has left or does not read: %s", error)
            return
        self._unread.add(tracker, sum(memoryview(frame).nbytes for frame in rows))
