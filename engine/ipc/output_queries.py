"""What the frontend, or any program of this user, asks an output processor, and what that answers."""

from __future__ import annotations

import msgspec

from ..io_struct import RoutedExpertsMeta


class FetchClaimReq(msgspec.Struct, frozen=True, tag="fetch_claim"):
    """Fetch the rows behind a claim; fetching does not consume it."""

    op_id: str
    claim: str


class ClaimReply(msgspec.Struct, frozen=True, tag="claim"):
    """Meta of the rows in the frame that follows, or the reason why there are none."""

    op_id: str
    meta: RoutedExpertsMeta | None = None
    error: str | None = None
    # The rows are there, and may be had later.
    is_busy: bool = False


class GetCountersReq(msgspec.Struct, frozen=True, tag="get_counters"):
    """Ask the output processor for its counters."""

    op_id: str


class GetExpertLoadReq(msgspec.Struct, frozen=True, tag="get_expert_load"):
    """Ask the output processor how often each expert was chosen since the last such question. It counts while it is asked
    every few seconds, and not at all otherwise."""

    op_id: str


class CountersReply(msgspec.Struct, frozen=True, tag="counters"):
    """What the output processor has done since it started."""

    op_id: str
    counters: dict[str, int]


class ExpertLoadReply(msgspec.Struct, frozen=True, tag="expert_load"):
    """Of a sample of `num_rows` tokens: how many chose each expert, uint32 [moe_layers, num_experts], little-endian.
    Without layers where nothing records routes."""

    op_id: str
    layer_ids: tuple[int, ...]
    num_experts: int
    num_rows: int
    counts: bytes


OutputQuery = FetchClaimReq | GetCountersReq | GetExpertLoadReq
OutputReply = ClaimReply | CountersReply | ExpertLoadReply
