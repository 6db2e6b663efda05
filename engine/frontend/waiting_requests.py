"""Requests that wait to be sent while weights change: an abort reaches them there, too."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from ..io_struct import FinishReason, RequestOutput
from .generation_gate import GenerationGate
from .sample_request import SampleRequest

# By a sample's rid, and by what the caller has called its request, if anything.
Matches = Callable[[str, str | None], bool]
NO_DP_RANK = -1


class _Wait:
    def __init__(self, names: Mapping[str, str | None]) -> None:
        self.names = names
        self.aborted: dict[str, str] = {}
        self.all_aborted = asyncio.Event()

    def abort(self, matches: Matches, message: str) -> int:
        found = [rid for rid, name in self.names.items() if rid not in self.aborted and matches(rid, name)]
        self.aborted |= dict.fromkeys(found, message)
        if len(self.aborted) == len(self.names):
            self.all_aborted.set()
        return len(found)


class WaitingRequests:
    """Those at the gate. Lives on one event loop."""

    def __init__(self, gate: GenerationGate) -> None:
        self._gate = gate
        self._waits: list[_Wait] = []

    async def enter(self, names: Mapping[str, str | None]) -> dict[str, str]:
        """Wait until the samples of a request may be sent; `names` has what the caller calls the request of each rid.

        Returns:
            The messages of the aborts that came first, by rid. Where all are aborted nothing more is waited for.

        Raises:
            UnavailableError: as `GenerationGate.enter`.
        """
        wait = _Wait(names)
        self._waits.append(wait)
        try:
            while not self._gate.is_open and not wait.all_aborted.is_set():
                await self._wait_once(wait)
            if not wait.all_aborted.is_set():
                # At once, unless it refuses.
                await self._gate.enter()
            return wait.aborted
        finally:
            self._waits.remove(wait)

    async def _wait_once(self, wait: _Wait) -> None:
        """Until the gate lets enter, or all are aborted. When this returns the gate may have closed again."""
        entering = asyncio.ensure_future(self._gate.enter())
        aborting = asyncio.ensure_future(wait.all_aborted.wait())
        try:
            await asyncio.wait((entering, aborting), return_when=asyncio.FIRST_COMPLETED)
            if not wait.all_aborted.is_set():
                entering.result()
        finally:
            entering.cancel()
            aborting.cancel()

    def abort(self, matches: Matches, message: str) -> int:
        """How many samples that is."""
        return sum(wait.abort(matches, message) for wait in self._waits)


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
