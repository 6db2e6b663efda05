"""What a leader has to do with requests whose prefill is one engine's and whose decode is another's; see
`prefill_transfers.py` and `decode_transfers.py` for the two sides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..io_struct import FinishReason, FirstToken, TokenOutput
from ..ipc.frontend_messages import TransferNotice
from ..plan import PageMessage
from .req import Req

# Of a rank that moves no pages; see `PageTransfers.counters`.
NO_COUNTERS = {
    "transferred_bytes": 0,
    "transferred_shared_bytes": 0,
    "transferred_nixl_bytes": 0,
    "transfer_seconds": 0.0,
    "transfer_copy_seconds": 0.0,
}
# Tells all tp ranks of the group.
Tell = Callable[[PageMessage], None]


@dataclass(frozen=True)
class Settled:
    """A request that waits for the other side no longer: it goes on with `first`, or ends for a reason."""

    req: Req
    first: FirstToken | None = None
    reason: FinishReason | None = None


class Transfers(Protocol):
    def begin(self, req: Req) -> str:
        """A request has come; why it cannot be served, or empty."""
        ...

    def admitted(self, reqs: Sequence[Req]) -> bool:
        """All pages of their prompts are reserved, and what the prefix cache has is on the first of them.

        Returns:
            Whether the output processor is to hear of it at once.
        """
        ...

    def committed(self, req: Req, output: TokenOutput | None) -> bool:
        """Prefill's side: positions were committed. Whether the request is kept, for the other side, even where it is
        finished."""
        ...

    def left(self, req: Req) -> None:
        """It gives its pages up: retracted, or (with a finish reason) finished."""
        ...

    def on_notice(self, notice: TransferNotice) -> None: ...

    def settle(self) -> list[Settled]:
        """Those that are ready since the last call."""
        ...

    @property
    def is_waiting(self) -> bool:
        """Whether anybody waits for the other side."""
        ...

    def state(self) -> dict[str, int | float]: ...


class NoTransfers:
    """An engine that does both."""

    is_waiting = False

    def begin(self, req: Req) -> str:
        return ""

    def admitted(self, reqs: Sequence[Req]) -> bool:
        return False

    def committed(self, req: Req, output: TokenOutput | None) -> bool:
        return False

    def left(self, req: Req) -> None: ...

    def on_notice(self, notice: TransferNotice) -> None: ...

    def settle(self) -> list[Settled]:
        return []

    def state(self) -> dict[str, int | float]:
        return {"num_transferring": 0, "num_transfers": 0, "num_transfers_failed": 0, **NO_COUNTERS}
