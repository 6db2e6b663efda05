"""Why an engine generates nothing, as it tells its frontend."""

from __future__ import annotations

from enum import Enum

import msgspec


class BlockedKind(Enum):
    """What stands against generating: an update has more tensors to bring; a transfer broke off in the middle; memory is
    released; the ranks have not said in time how an operation ended."""

    INCOMPLETE = "incomplete"
    TORN = "torn"
    RELEASED = "released"
    UNANSWERED = "unanswered"


class Blocked(msgspec.Struct, frozen=True):
    """Why nobody may generate; the message is for callers, and says what ends it."""

    kind: BlockedKind
    message: str
