"""Requests that were sent to the engine and are not yet told to have ended, whoever still waits for them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence
from functools import partial

from ..ipc.frontend_messages import AbortReq
from ..vision.image_store import StoredImage
from .dp_router import DpRouter
from .generate_request import GenerateReqInput
from .generation_gate import GenerationGate
from .leader_link import LeaderLink
from .request_preparation import tokenized_request
from .sample_request import SampleRequest

logger = logging.getLogger(__name__)

# Prompts' bytes that are sent to leaders in one go.
MAX_SENT_BYTES = 4 << 20


class InFlightRequests:
    """Sends samples to the dp rank that the router chooses, which has their load until their end is told."""

    def __init__(self, link: LeaderLink, dp_router: DpRouter, gate: GenerationGate) -> None:
        self._link = link
        self._dp_router = dp_router
        self._gate = gate
        self._dp_ranks: dict[str, int] = {}
        # What callers have called the requests of these samples, if anything.
        self._names: dict[str, str | None] = {}
        # What ranks may read until their end.
        self._images: dict[str, tuple[StoredImage, ...]] = {}
        self._end_told = asyncio.Event()

    def __contains__(self, rid: str) -> bool:
        return rid in self._dp_ranks

    def __len__(self) -> int:
        return len(self._dp_ranks)

    async def send(self, request: GenerateReqInput, samples: Sequence[SampleRequest]) -> None:
        """Send the samples of one prompt to one dp rank; other requests have their turn after some megabytes."""
        input_ids, keys = (ids.astype("<i4", copy=False).tobytes() for ids in (samples[0].input_ids, samples[0].keys))
        dp_rank = self._dp_router.choose(
            keys,
            request.cache_partition,
            session_id=request.affinity,
            routed_dp_rank=request.dp_rank if samples[0].dp_rank is None else samples[0].dp_rank,
            num_samples=len(samples),
        )
        num_sent = num_bytes = 0
        try:
            for sample in samples:
                self._link.send(dp_rank, partial(tokenized_request, request, sample, input_ids, keys))
                for image in sample.stored:
                    image.pin()
                self._images[sample.rid] = sample.stored
                self._dp_ranks[sample.rid] = dp_rank
                self._names[sample.rid] = request.name_of(sample.item)
                num_sent += 1
                num_bytes += len(input_ids)
                if num_bytes >= MAX_SENT_BYTES:
                    num_bytes = 0
                    await asyncio.sleep(0)
                    # What was sent may have ended, and an update of weights begun.
                    await self._gate.enter()
        finally:
            for _ in range(len(samples) - num_sent):
                self._dp_router.release(dp_rank)

    def matching(self, prefix: str) -> set[str]:
        """Those whose rid starts so."""
        return {rid for rid in self._dp_ranks if rid.startswith(prefix)}

    def named(self, names: Collection[str]) -> set[str]:
        """Those that are called so, or whose request is: a sample of several has a number behind its request's name."""
        wanted = set(names)
        return {rid for rid, name in self._names.items() if rid in wanted or name in wanted}

    async def wait_for_ends(self, rids: set[str]) -> None:
        """Until none of these is at the engine. One that comes again under its rid is waited for, too."""
        while not rids.isdisjoint(self._dp_ranks):
            self._end_told.clear()
            await self._end_told.wait()

    def abort(self, rid: str) -> None:
        """Have the one that is named exactly so ended, if it has not."""
        self._link.send_to_all(lambda number: AbortReq(number, rid, exact=True))

    def end(self, rid: str) -> None:
        """The engine has told the end of one."""
        dp_rank = self._dp_ranks.pop(rid, None)
        if dp_rank is None:
            # Every request is at the engine until its one finish is told.
            logger.error("%s: an end was told of a request that is not at the engine", rid)
            return
        del self._names[rid]
        for image in self._images.pop(rid):
            image.unpin()
        self._dp_router.release(dp_rank)
        self._end_told.set()
