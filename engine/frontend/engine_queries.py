"""Questions to the engine's processes that no step answers: states, counters, the rows behind claims."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from ..ipc.frontend_messages import ControlReply, GetInternalStateReq
from ..ipc.output_queries import (
    ClaimReply,
    CountersReply,
    ExpertLoadReply,
    FetchClaimReq,
    GetCountersReq,
    GetExpertLoadReq,
    OutputQuery,
    OutputReply,
)
from ..ipc.sockets import Endpoint, address_of
from ..routing.claims import ClaimError, processor_of
from ..routing.wire import RoutedExperts, decode
from .admission import OverloadedError
from .engine_connection import EngineConnection
from .engine_controls import CONTROL_TIMEOUT_S

# Claims fetched at once.
MAX_FETCHES = 16
# Of these the engine has the largest of its ranks'; texts are the same on all; the rest adds up.
LARGEST = (
    "num_steps",
    "num_decode_graph_steps",
    "num_prefill_graph_steps",
    "finish_max_s",
    "max_step_s",
    "is_paused",
    "is_blocked",
    "num_weight_updates",
)


class EngineQueries:
    """Asks the leaders of all dp ranks and the output processors behind `endpoints`."""

    def __init__(self, connection: EngineConnection, endpoints: Sequence[Endpoint | str], dp_size: int) -> None:
        self._connection = connection
        self._dp_size = dp_size
        # Where claims of this node are fetched without HTTP: a ROUTER that takes `FetchClaimReq`.
        self.claims_address = address_of(endpoints[0])
        # Rows on their way from there to here: few at once, so that they never wait for each other in a socket's queue.
        self._fetches = asyncio.Semaphore(MAX_FETCHES)

    async def get_state(self, *, check_pages: bool = True) -> dict[str, Any]:
        """The leaders' states, merged, and the sums of the output processors' counters."""
        states = await self.get_leader_states(check_pages=check_pages)
        return {**merge_states(states), **add_counters(await self._ask_processors(GetCountersReq))}

    async def get_leader_states(self, *, check_pages: bool = True) -> list[ControlReply]:
        """What each leader says of itself, between two of its steps. An idle one checks its pages before, if wanted: the
        more are cached, the longer that takes."""
        return await asyncio.gather(*(self._ask_leader(rank, check_pages) for rank in range(self._dp_size)))

    async def get_expert_loads(self) -> list[ExpertLoadReply]:
        """What each output processor has counted since the last call; see `GetExpertLoadReq`."""
        replies = await self._ask_processors(GetExpertLoadReq)
        return [reply for reply in replies if isinstance(reply, ExpertLoadReply)]

    async def fetch_routed_experts(self, claim: str) -> RoutedExperts:
        """The rows behind a claim, verified.

        Raises:
            ClaimError: the claim is unknown or has expired.
            OverloadedError: too many rows are on their way already.
            ValueError: what arrived is damaged.
        """
        processor = processor_of(claim, len(self._connection.query_sockets))
        async with self._fetches:
            reply, frames = await self._ask_processor(processor, lambda op_id: FetchClaimReq(op_id, claim))
        assert isinstance(reply, ClaimReply)
        if reply.is_busy:
            raise OverloadedError(str(reply.error))
        if reply.meta is None:
            raise ClaimError(reply.error)
        return decode(reply.meta, frames[0])

    async def _ask_leader(self, dp_rank: int, check_pages: bool) -> ControlReply:
        op_id = uuid.uuid4().hex
        future = self._connection.replies.expect(op_id)
        self._connection.link.ask(dp_rank, GetInternalStateReq(op_id, check_pages))
        reply: ControlReply = await asyncio.wait_for(future, CONTROL_TIMEOUT_S)
        return reply

    async def _ask_processors(self, make: Callable[[str], OutputQuery]) -> list[OutputReply]:
        """All of them at once."""
        indices = range(len(self._connection.query_sockets))
        answers = await asyncio.gather(*(self._ask_processor(index, make) for index in indices))
        return [reply for reply, _ in answers]

    async def _ask_processor(
        self, processor: int, make: Callable[[str], OutputQuery]
    ) -> tuple[OutputReply, list[bytes]]:
        op_id = uuid.uuid4().hex
        future = self._connection.replies.expect(op_id)
        await self._connection.query_sockets[processor].send(msgspec.msgpack.encode(make(op_id)))
        reply: tuple[OutputReply, list[bytes]] = await asyncio.wait_for(future, CONTROL_TIMEOUT_S)
        return reply


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
