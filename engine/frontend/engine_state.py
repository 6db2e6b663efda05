"""The state of an engine, from the states of its dp ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec

from ..io_struct import CountersReply, OutputReply
from ..ipc.frontend_messages import ControlReply

# Of these the engine has the largest of its ranks'; texts are the same on all; the rest adds up.
LARGEST = ("num_steps", "finish_max_s", "max_step_s", "is_paused", "is_blocked", "num_weight_updates")


def merge_states(replies: Sequence[ControlReply]) -> dict[str, Any]:
    """Totals, and beside them `dp_ranks`, each rank's own state, and `sync_waits`, who waited for whom."""
    merged: dict[str, Any] = {}
    for key, first in replies[0].state.items():
        values: list[Any] = [reply.state[key] for reply in replies]
        if isinstance(first, str):
            merged[key] = first
        else:
            merged[key] = max(values) if key in LARGEST else sum(values)
    merged["dp_ranks"] = [reply.state for reply in replies]
    merged["sync_waits"] = [
        {"rank": rank, **msgspec.structs.asdict(wait)}
        for rank, reply in enumerate(replies)
        for wait in reply.sync_waits
    ]
    return merged


def add_counters(replies: Sequence[OutputReply]) -> dict[str, int]:
    """Sums of the output processors' counters."""
    total: Counter[str] = Counter()
    for reply in replies:
        assert isinstance(reply, CountersReply)
        total.update(reply.counters)
    return dict(total)
