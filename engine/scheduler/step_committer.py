"""Turns the results of a step into committed tokens, finished requests and the step's record."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import numpy as np

from ..io_struct import FinishReason, Logprobs, ReqFinished, Segment, TokenOutput
from ..plan import ScheduledReq, StepResult
from ..text.decoder_stages import DecoderError
from .page_manager import PageManager
from .req import Req
from .request_queues import RequestQueues
from .step_planner import PlannedReq
from .stop_checker import StopChecker
from .transfers import NoTransfers, Transfers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Committed:
    """The part of a step's record that committing it yields."""

    segments: list[Segment]
    outputs: list[TokenOutput]
    finished: list[ReqFinished]


@dataclass
class FinishCost:
    """Time that finishing requests took on the step thread: page release and prefix-cache insert included."""

    num_finished: int = 0
    total_s: float = 0.0
    max_s: float = 0.0

    def add(self, seconds: float) -> None:
        self.num_finished += 1
        self.total_s += seconds
        self.max_s = max(self.max_s, seconds)

    def state(self) -> dict[str, int | float | str]:
        return {"num_finished": self.num_finished, "finish_total_s": self.total_s, "finish_max_s": self.max_s}


class StepCommitter:
    """Applies step results in order."""

    def __init__(
        self,
        queues: RequestQueues,
        pages: PageManager,
        stop_checker: StopChecker,
        transfers: Transfers | None = None,
    ) -> None:
        self._queues = queues
        self._pages = pages
        self._stop_checker = stop_checker
        self._transfers = transfers or NoTransfers()
        self.finish_cost = FinishCost()

    def commit(self, planned: list[PlannedReq], result: StepResult) -> Committed:
        """Commit one step. The rows of a request that finished while the step was in flight, or that failed in it, are
        discarded; its keys and values do not enter the prefix cache."""
        committed = Committed([], [], [])
        sampled = 0
        for index, item in enumerate(planned):
            req, segment = item.req, item.segment
            position = sampled
            sampled += item.scheduled.sample
            failure = result.failures.get(index)
            if req.finish_reason is not None or failure is not None:
                committed.segments.append(
                    Segment(segment.rid, segment.start, segment.num_tokens, segment.new_pages, discarded=True)
                )
                if req.finish_reason is None and failure is not None:
                    committed.finished.append(self._fail(req, failure))
                continue
            committed.segments.append(segment)
            req.num_committed = segment.start + segment.num_tokens
            output = self._collect(req, item, result, index, position)
            if output is not None:
                committed.outputs.append(output)
            prefill_only = req.params.max_new_tokens == 0 and req.num_committed == req.num_prompt_tokens
            is_kept = self._transfers.committed(req, output)
            if (item.scheduled.sample or prefill_only) and not is_kept:
                req.finish_reason = self.check_stop(req)
            if req.finish_reason is None:
                self._pages.offer_full_pages(req)
            else:
                committed.finished.append(self.finish(req))
        return committed

    def check_stop(self, req: Req) -> FinishReason | None:
        """Stop strings are searched in text that a library makes of whatever was sampled: if it fails, the request does."""
        try:
            return self._stop_checker.check(req)
        except DecoderError as error:
            logger.error("%s: its stop strings cannot be searched", req.rid, exc_info=error)
            return FinishReason.failed(str(error))

    def _fail(self, req: Req, message: str) -> ReqFinished:
        logger.warning("%s failed at position %d: %s", req.rid, req.num_committed, message)
        req.finish_reason = FinishReason.failed(message)
        return self.finish(req)

    def finish(self, req: Req) -> ReqFinished:
        """Take a request whose `finish_reason` is set out of the engine, and its pages back."""
        assert req.finish_reason is not None
        began = time.perf_counter()
        self._transfers.left(req)
        if req.is_running:
            self._pages.offer_full_pages(req)
            self._pages.release(req)
        self._queues.remove(req)
        self.finish_cost.add(time.perf_counter() - began)
        return ReqFinished(req.rid, req.finish_reason)

    @staticmethod
    def _collect(req: Req, item: PlannedReq, result: StepResult, index: int, position: int) -> TokenOutput | None:
        """Append the sampled token to the request; None if the step yielded nothing to tell."""
        token_ids: list[int] = []
        if item.scheduled.sample:
            token_ids = [result.token_ids[position]]
            req.output_ids.extend(token_ids)
            req.append(token_ids)
        logprobs = _logprobs(req, item.scheduled, result, index, position) if req.options.return_logprob else None
        if not token_ids and (logprobs is None or not logprobs.input):
            return None
        return TokenOutput(req.rid, token_ids, logprobs)


def _logprobs(req: Req, scheduled: ScheduledReq, result: StepResult, index: int, position: int) -> Logprobs:
    """Those of the sampled token, and of the prompt tokens that this step scored, the unscorable first one included."""
    logprobs, with_top = Logprobs(), req.options.top_logprobs_num > 0
    if req.options.logprob_start_len == 0 and req.num_scored == 0 and scheduled.start == 0:
        logprobs.input.append((None, int(np.frombuffer(req.token_bytes(0, 1), dtype="<i4")[0])))
        logprobs.input_ranks.append(None)
        if with_top:
            logprobs.input_top.append(None)
        req.num_scored = 1
    scores = result.prompt_scores.get(index)
    if scores is not None:
        first = scheduled.start + scheduled.prompt_logprobs_from + 1
        ids = np.frombuffer(req.token_bytes(first, first + len(scores.logprobs)), dtype="<i4").tolist()
        logprobs.input.extend(zip(scores.logprobs, ids, strict=True))
        logprobs.input_ranks.extend(scores.ranks)
        if with_top:
            logprobs.input_top.extend(scores.top)
        req.num_scored = first + len(scores.logprobs)
    if scheduled.sample:
        logprobs.output.append(result.logprobs[position])
        if with_top:
            logprobs.output_top.append(result.top_logprobs[position])
    return logprobs
