"""Requests that the engine does not have yet: an abort reaches them, too, while their images are encoded, and while weights
change."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

from ..io_struct import FinishReason, RequestOutput
from .generation_gate import GenerationGate
from .sample_request import SampleRequest

T = TypeVar("T")
# By a sample's rid, and by what the caller has called its request, if anything.
Matches = Callable[[str, str | None], bool]
NO_DP_RANK = -1


class WaitingRequest:
    """By the rid of each sample: `names` is what the caller calls its request, `aborted` the message of an abort."""

    def __init__(self, names: Mapping[str, str | None], waiting: set[WaitingRequest]) -> None:
        self.names = names
        self.aborted: dict[str, str] = {}
        self._all_aborted = asyncio.Event()
        self._waiting = waiting
        waiting.add(self)

    def end(self) -> None:
        """It is sent, or given up; may be called again."""
        self._waiting.discard(self)

    @property
    def is_aborted(self) -> bool:
        """Whether all of it is."""
        return self._all_aborted.is_set()

    def abort(self, matches: Matches, message: str) -> int:
        found = [rid for rid, name in self.names.items() if rid not in self.aborted and matches(rid, name)]
        self.aborted |= dict.fromkeys(found, message)
        if found and len(self.aborted) == len(self.names):
            self._all_aborted.set()
        return len(found)

    async def unless_aborted(self, work: Coroutine[Any, Any, T], drop: Callable[[T], None] | None = None) -> T | None:
        """The result of `work`; None where all is aborted first: it is cancelled then, and `drop` gets a result that it has
        all the same."""
        working = asyncio.create_task(work)
        aborting = asyncio.create_task(self._all_aborted.wait())
        is_taken = False
        try:
            await asyncio.wait((working, aborting), return_when=asyncio.FIRST_COMPLETED)
            is_taken = not self.is_aborted
            return working.result() if is_taken else None
        finally:
            working.cancel()
            aborting.cancel()
            if not is_taken:
                await asyncio.gather(working, return_exceptions=True)
                if drop is not None and not working.cancelled() and working.exception() is None:
                    drop(working.result())


class WaitingRequests:
    """Lives on one event loop."""

    def __init__(self, gate: GenerationGate) -> None:
        self._gate = gate
        self._waiting: set[WaitingRequest] = set()

    def begin(self, names: Mapping[str, str | None]) -> WaitingRequest:
        """From here on aborts reach it, until `end`."""
        return WaitingRequest(names, self._waiting)

    async def enter(self, request: WaitingRequest) -> dict[str, str]:
        """Wait until the samples of a request may be sent. It waits no longer then.

        Returns:
            The messages of the aborts that came first, by rid. Where all are aborted nothing more is waited for.

        Raises:
            UnavailableError: as `GenerationGate.enter`.
        """
        try:
            while not self._gate.is_open and not request.is_aborted:
                # When it lets enter, it may have closed again by now.
                await request.unless_aborted(self._gate.enter())
            if not request.is_aborted:
                # At once, unless it refuses.
                await self._gate.enter()
            return request.aborted
        finally:
            request.end()

    def abort(self, matches: Matches, message: str) -> int:
        """How many samples that is."""
        return sum(request.abort(matches, message) for request in self._waiting)


def aborted_output(sample: SampleRequest, message: str, weight_version: str) -> RequestOutput:
    """The whole answer of a sample that the engine has never seen."""
    asks_for_routes = sample.output_options.return_routed_experts
    return RequestOutput(
        rid=sample.rid,
        text="",
        token_ids=[],
        prompt_tokens=len(sample.input_ids),
        completion_tokens=0,
        cached_tokens=0,
        num_retractions=0,
        weight_version=weight_version,
        dp_rank=NO_DP_RANK,
        finish_reason=FinishReason("abort", message=message),
        routed_experts_error="the request was aborted before the engine had it" if asks_for_routes else None,
    )
