"""One event of the page's feed: what the engine counts, as it stands and per second. Pure functions."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from ...ipc.output_queries import ExpertLoadReply
from .recent_requests import EndedRequest

MILLI = 1e3
MAX_UINT16 = (1 << 16) - 1


class RankNow(msgspec.Struct, frozen=True):
    """One dp rank. Requests and pages as they stand; `step_ms` is the mean time from step to step, rests included, None
    where it made none. `delays_ms` is what the other ranks waited for it, `waits_ms` what it waited for them, in
    milliseconds per second, over all of them."""

    dp_rank: int
    running: int
    queued: int
    pages: int
    free_pages: int
    cached_pages: int
    steps_per_s: float
    step_ms: float | None
    max_step_ms: float
    delays_ms: float
    waits_ms: float


class WaitNow(msgspec.Struct, frozen=True):
    """Milliseconds per second that `rank` waited for `straggler`, and why that one was late."""

    rank: int
    straggler: int
    cause: str
    ms: float


class RoutesNow(msgspec.Struct, frozen=True):
    """Rates per second, but for `rows_shipped` and `refused`, which count since the start, and the ring as it stands."""

    is_enabled: bool
    rows_filed_per_s: float
    rows_shipped_per_s: float
    bytes_shipped_per_s: float
    rows_shipped: int
    refused: int
    ring_slots: int
    ring_occupied: int


class ExpertLoadNow(msgspec.Struct, frozen=True):
    """Of a sample of `num_rows` tokens, how many chose each expert: base64 of uint16 [moe_layers, num_experts], in
    little-endian order."""

    layer_ids: tuple[int, ...]
    num_experts: int
    num_rows: int
    counts: str


class EngineNow(msgspec.Struct, frozen=True):
    """What the engine told. Rates are per second of `interval_s`, 0.0 in the first event, where there is none yet."""

    interval_s: float
    state: str
    reason: str
    weight_version: str
    weight_updates: int
    tokens_per_s: float
    retractions: int
    page_size: int
    ranks: list[RankNow]
    waits: list[WaitNow]
    routes: RoutesNow
    expert_load: ExpertLoadNow | None


class LiveEvent(msgspec.Struct, frozen=True):
    """`engine` is None while it does not answer; `reason` says why. `time` in seconds since 1970. The newest of `requests`
    comes first."""

    time: float
    model: str
    tp_size: int
    dp_size: int
    viewers: int
    reason: str
    engine: EngineNow | None
    requests: list[EndedRequest]


def engine_now(
    now: dict[str, Any],
    before: dict[str, Any] | None,
    interval_s: float,
    loads: Sequence[ExpertLoadReply],
) -> EngineNow:
    """From two states of the engine, `interval_s` seconds apart; without the first, rates are 0."""
    if before is None or len(before["dp_ranks"]) != len(now["dp_ranks"]) or interval_s <= 0:
        before, interval_s = now, 0.0

    def rate(key: str) -> float:
        return per_second(now[key] - before[key], interval_s)

    waits = waits_now(now["sync_waits"], before["sync_waits"], interval_s)
    return EngineNow(
        interval_s=interval_s,
        state="blocked" if now["is_blocked"] else "paused" if now["is_paused"] else "ready",
        reason=now["blocked"],
        weight_version=now["weight_version"],
        weight_updates=now["num_weight_updates"],
        tokens_per_s=rate("num_output_tokens"),
        retractions=now["num_retractions"],
        page_size=now["page_size"],
        ranks=[
            rank_now(dp_rank, rank, earlier, interval_s, waits)
            for dp_rank, (rank, earlier) in enumerate(zip(now["dp_ranks"], before["dp_ranks"], strict=True))
        ],
        waits=waits,
        routes=RoutesNow(
            is_enabled=bool(loads) and bool(loads[0].layer_ids),
            rows_filed_per_s=rate("routed_experts_rows_filed"),
            rows_shipped_per_s=rate("routed_experts_rows_shipped"),
            bytes_shipped_per_s=rate("routed_experts_bytes_shipped"),
            rows_shipped=now["routed_experts_rows_shipped"],
            refused=now["routed_experts_refused"],
            ring_slots=now["routing_ring_slots"],
            ring_occupied=now["routing_ring_occupied"],
        ),
        expert_load=expert_load_now(loads),
    )


def per_second(amount: float, interval_s: float) -> float:
    """A counter that began anew has no rate."""
    return max(amount, 0) / interval_s if interval_s else 0.0


def rank_now(
    dp_rank: int, now: dict[str, Any], before: dict[str, Any], interval_s: float, waits: Sequence[WaitNow]
) -> RankNow:
    steps_per_s = per_second(now["num_steps"] - before["num_steps"], interval_s)
    return RankNow(
        dp_rank=dp_rank,
        running=now["num_running"],
        queued=now["num_waiting"],
        pages=now["num_pages"],
        free_pages=now["num_free_pages"],
        cached_pages=now["num_cached_pages"],
        steps_per_s=steps_per_s,
        step_ms=MILLI / steps_per_s if steps_per_s else None,
        max_step_ms=MILLI * now["max_step_s"],
        delays_ms=sum(wait.ms for wait in waits if wait.straggler == dp_rank),
        waits_ms=sum(wait.ms for wait in waits if wait.rank == dp_rank),
    )


def waits_now(now: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]], interval_s: float) -> list[WaitNow]:
    """Who waited for whom in the interval, the longest first."""
    earlier = {(wait["rank"], wait["straggler"], wait["cause"]): wait["seconds"] for wait in before}
    waits = []
    for wait in now:
        key = (wait["rank"], wait["straggler"], wait["cause"])
        ms = MILLI * per_second(wait["seconds"] - earlier.get(key, 0.0), interval_s)
        if ms:
            waits.append(WaitNow(*key, ms))
    return sorted(waits, key=lambda wait: -wait.ms)


def expert_load_now(loads: Sequence[ExpertLoadReply]) -> ExpertLoadNow | None:
    """The sum over output processors; None where nothing was sampled."""
    num_rows = sum(load.num_rows for load in loads)
    if not num_rows:
        return None
    layer_ids, num_experts = loads[0].layer_ids, loads[0].num_experts
    counts = sum(np.frombuffer(load.counts, dtype="<u4") for load in loads if load.layer_ids)
    packed = np.minimum(counts, MAX_UINT16).astype("<u2")
    return ExpertLoadNow(layer_ids, num_experts, num_rows, base64.b64encode(packed.tobytes()).decode("ascii"))
