"""One sample of one prompt, as it goes to the engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import msgspec

from ..io_struct import OutputOptions, SamplingParams, TransferSource
from ..validation.token_ids import Ids
from .request_limits import EngineLimits, check_transfer


@dataclass(frozen=True)
class SharedPrefix:
    """Rows [start, end) that this sample shares with an earlier choice of its prompt, whose answer has them."""

    choice: int
    start: int
    end: int


@dataclass(frozen=True)
class SampleRequest:
    """One sample of one prompt, fully checked. With `is_auto` its rows begin where the session's caller has them, and for
    all but a prompt's first sample behind the `shared_prefix`."""

    rid: str
    item: int
    input_ids: Ids
    sampling_params: SamplingParams
    output_options: OutputOptions
    is_auto: bool = False
    shared_prefix: SharedPrefix | None = None
    transfer: TransferSource | None = None
    # Which it must go to, whatever the request says.
    dp_rank: int | None = None


def with_transfer(samples: list[SampleRequest], place: list[Any], limits: EngineLimits) -> list[SampleRequest]:
    """Samples of one prompt, with where the other side is (host, port and room); on a prefill's side they end with their
    first token, and only the other one has rows to return."""
    host, port, room = place
    if host is None and port is None and room is None:
        return samples
    check_transfer(host, port, room, limits)
    source = TransferSource(host or "", limits.bootstrap_port if port is None else port, room)
    moved = [replace(one, transfer=msgspec.structs.replace(source, sample=i)) for i, one in enumerate(samples)]
    if limits.disaggregation == "decode":
        return moved
    return [
        replace(
            one,
            dp_rank=room % limits.dp_size,
            sampling_params=msgspec.structs.replace(
                one.sampling_params, max_new_tokens=min(1, one.sampling_params.max_new_tokens)
            ),
            output_options=msgspec.structs.replace(
                one.output_options,
                return_routed_experts=False,
                return_router_weights=False,
                routed_experts_start_len=0,
                stream_routed_experts=False,
            ),
        )
        for one in moved
    ]
