"""What a leader is started with: its sockets, and which dp rank it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..ipc.frontend_messages import BackendMessage
from ..ipc.record_sender import Records
from ..ipc.sockets import Sender
from ..plan import GraphSizes, PeerMessage, StepShape
from .agreement import Agreement
from .mailbox import Inbox

NO_GRAPHS = GraphSizes()


@dataclass(frozen=True)
class Endpoints:
    """The leader's sockets."""

    inbox: Inbox
    peers: Sequence[Sender[PeerMessage]]
    records: Records
    frontend: Sender[BackendMessage]


@dataclass(frozen=True)
class DpRankInfo:
    """Which leader this is, and where the rows of its tokens stand in a ring slot: `first_recorded_dp` is the dp rank
    whose rows come first there."""

    dp_rank: int = 0
    dp_size: int = 1
    tp_size: int = 1
    first_recorded_dp: int = 0
    graph_sizes: GraphSizes = NO_GRAPHS

    def shape_of(self, agreement: Agreement) -> StepShape:
        """Of the step that was agreed on."""
        is_decode, has_images = agreement.is_decode, agreement.has_images
        if self.dp_size == 1:
            return StepShape(0, is_decode, has_images)
        num_rows = agreement.rows_per_rank(self.tp_size)
        padded = self.graph_sizes.pad(num_rows, is_decode=is_decode, has_images=has_images)
        return StepShape(padded, is_decode, has_images)

    def first_row(self, num_rows: int) -> int:
        """In a step in which every rank has `num_rows` rows; 0 says that the tokens are replicated."""
        return (self.dp_rank - self.first_recorded_dp) * self.tp_size * num_rows
