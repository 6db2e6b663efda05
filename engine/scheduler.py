"""The leader's loop: receive -> plan -> launch -> commit.

It orders and delegates: `StepPlanner` decides who runs, the runner computes, `StepCommitter` applies results, and every
step's `StepRecord` tells the output processor what happened. It holds no tensor. With `overlap_depth` 1 step k + 1 is
planned and launched before step k is committed.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from .config import EngineConfig
from .io_struct import (
    AbortReq,
    BackendMessage,
    BeforeEvent,
    CacheFlushed,
    ControlReply,
    FinishReason,
    FlushCacheReq,
    FrontendMessage,
    GetInternalStateReq,
    OutputRecord,
    ReqFinished,
    ReqStarted,
    ShutdownReq,
    StepRecord,
    TokenizedGenerateReqInput,
)
from .page_manager import PageManager
from .request_queues import RequestQueues
from .routing.ring import RouteRing
from .schedule_batch import PeerMessage, Req, ScheduleBatch, StopPeers
from .schedule_policy import StepLimits
from .sockets import Receiver, Sender
from .step_committer import Committed, StepCommitter, StepResult
from .step_planner import StepPlan, StepPlanner
from .stop_checker import StopChecker

logger = logging.getLogger(__name__)

IDLE_WAIT_S = 5.0

LaunchedT = TypeVar("LaunchedT")


class Runner(Protocol[LaunchedT]):
    """Executes plans. `launch` enqueues a step; `result` waits for it; `ring_seq` says where its routing went."""

    def start_req(self, row: int, req: Req, stop_ids: frozenset[int]) -> None: ...

    def launch(self, batch: ScheduleBatch) -> LaunchedT: ...

    def result(self, launched: LaunchedT) -> StepResult: ...

    def ring_seq(self, launched: LaunchedT) -> int: ...


@dataclass(frozen=True)
class Endpoints:
    """The leader's sockets."""

    inbox: Receiver[FrontendMessage]
    peers: Sequence[Sender[PeerMessage]]
    records: Sender[OutputRecord]
    frontend: Sender[BackendMessage]


@dataclass(frozen=True)
class InFlight(Generic[LaunchedT]):
    """A launched step, its plan, and the events that its record begins with."""

    plan: StepPlan
    before: list[BeforeEvent]
    launched: LaunchedT


class Scheduler(Generic[LaunchedT]):
    """One replica's leader. `run` returns after a `ShutdownReq`."""

    def __init__(
        self,
        config: EngineConfig,
        limits: StepLimits,
        pages: PageManager,
        stop_checker: StopChecker,
        runner: Runner[LaunchedT],
        endpoints: Endpoints,
        ring: RouteRing | None = None,
    ) -> None:
        self._config = config
        self._pages = pages
        self._stop_checker = stop_checker
        self._runner = runner
        self._endpoints = endpoints
        self._ring = ring
        self.queues = RequestQueues(limits.max_running)
        self._planner = StepPlanner(self.queues, pages, limits)
        self.committer = StepCommitter(self.queues, pages, stop_checker)
        self._in_flight: deque[InFlight[LaunchedT]] = deque()
        self._before: list[BeforeEvent] = []
        self._num_steps = 0
        self._num_records = 0
        self._num_received = 0
        self._serving = True
        self._handlers: dict[type, Callable[..., None]] = {
            TokenizedGenerateReqInput: self._on_generate,
            AbortReq: self._on_abort,
            FlushCacheReq: self._on_flush_cache,
            GetInternalStateReq: self._on_get_internal_state,
            ShutdownReq: self._on_shutdown,
        }

    def run(self) -> None:
        while self._serving:
            self.receive()
            self.step()
        self._commit_down_to(0)
        for peer in self._endpoints.peers:
            peer.send(StopPeers())

    def receive(self) -> None:
        """Handle what has arrived; sleep for it when there is nothing else to do."""
        if self.is_idle:
            self._endpoints.inbox.wait(IDLE_WAIT_S)
        while (message := self._endpoints.inbox.receive_nowait()) is not None:
            self._handlers[type(message)](message)

    @property
    def is_idle(self) -> bool:
        return not self._in_flight and len(self.queues) == 0

    def step(self) -> None:
        """Plan and launch one step, then commit those that are due."""
        plan = self._planner.plan(in_flight=bool(self._in_flight))
        if plan.planned:
            self._launch(plan)
            self._commit_down_to(self._config.overlap_depth)
            return
        self._before.extend(plan.before)
        self._commit_down_to(0)
        if self._before:
            self._record_idle([])

    # --- steps ------------------------------------------------------------------------------------------------------

    def _launch(self, plan: StepPlan) -> None:
        for item in plan.planned:
            if item.scheduled.start == item.req.num_cached:
                self._runner.start_req(item.req.row, item.req, self._stop_checker.stop_ids(item.req))
        batch = plan.to_batch(self._num_steps)
        self._num_steps += 1
        for peer in self._endpoints.peers:
            peer.send(batch)
        before, self._before = self._before + plan.before, []
        self._in_flight.append(InFlight(plan, before, self._runner.launch(batch)))

    def _commit_down_to(self, depth: int) -> None:
        """Commit the oldest steps until at most `depth` are in flight."""
        while len(self._in_flight) > depth:
            step = self._in_flight.popleft()
            result = self._runner.result(step.launched)
            committed = self.committer.commit(step.plan.planned, result)
            self._record(step.before, self._runner.ring_seq(step.launched), committed)

    def _record_idle(self, finished: list[ReqFinished]) -> None:
        """A record without a forward; what is in flight must have been committed, or the order would be wrong."""
        assert not self._in_flight
        before, self._before = self._before, []
        self._record(before, -1, Committed([], [], finished))

    def _record(self, before: list[BeforeEvent], ring_seq: int, committed: Committed) -> None:
        self._endpoints.records.send(
            StepRecord(
                dp_rank=0,
                step=self._num_records,
                ring_seq=ring_seq,
                weight_version=self._config.weight_version,
                before=before,
                segments=committed.segments,
                outputs=committed.outputs,
                after=committed.finished,
            )
        )
        self._num_records += 1

    # --- messages ---------------------------------------------------------------------------------------------------

    def _on_generate(self, message: TokenizedGenerateReqInput) -> None:
        req = Req(message, arrival=self._num_received, tokens=bytearray(message.input_ids))
        req.num_scored = max(0, message.logprob_start_len)
        self._num_received += 1
        self.queues.add(req)
        self._before.append(
            ReqStarted(
                rid=req.rid,
                num_prompt_tokens=req.num_prompt_tokens,
                skip_special_tokens=req.params.skip_special_tokens,
                no_stop_trim=req.params.no_stop_trim,
                stop=req.params.stop,
                stream=message.stream,
                return_logprob=message.return_logprob,
                return_routed_experts=message.return_routed_experts,
                routed_experts_start_len=message.routed_experts_start_len,
                routed_experts_delivery=message.routed_experts_delivery,
                stream_routed_experts=message.stream_routed_experts,
            )
        )

    def _on_abort(self, message: AbortReq) -> None:
        """Abort in any state: what is in flight is committed first, so that only requests between steps are left."""
        if not message.rid and not message.abort_all:
            return
        prefix = "" if message.abort_all else message.rid
        if not self.queues.matching(prefix, exact=message.exact):
            return
        self._commit_down_to(0)
        finished: list[ReqFinished] = []
        for req in self.queues.matching(prefix, exact=message.exact):
            req.finish_reason = FinishReason("abort", message="aborted by request")
            finished.append(self.committer.finish(req))
        self._record_idle(finished)

    def _on_flush_cache(self, message: FlushCacheReq) -> None:
        self._commit_down_to(0)
        if len(self.queues):
            reply = ControlReply(message.op_id, False, f"not flushed: {len(self.queues)} requests run or wait")
        else:
            self._pages.flush()
            self._pages.check_integrity()
            self._before.append(CacheFlushed())
            self._record_idle([])
            reply = ControlReply(message.op_id, True, "cache flushed")
        self._endpoints.frontend.send(reply)

    def _on_get_internal_state(self, message: GetInternalStateReq) -> None:
        self._endpoints.frontend.send(ControlReply(message.op_id, True, state=self.state()))

    def _on_shutdown(self, message: ShutdownReq) -> None:
        self._serving = False

    def state(self) -> dict[str, int | float | str]:
        """Counters and sizes of this replica."""
        pool, cache, cost = self._pages.pool, self._pages.cache, self.committer.finish_cost
        if self.is_idle:
            self._pages.check_integrity()
        return {
            "num_running": len(self.queues.running),
            "num_waiting": self.queues.num_waiting,
            "num_steps": self._num_steps,
            "num_retractions": self._planner.num_retractions,
            "num_pages": pool.num_pages,
            "num_free_pages": pool.num_free,
            "num_cached_pages": cache.num_cached_pages,
            "num_finished": cost.num_finished,
            "finish_total_s": cost.total_s,
            "finish_max_s": cost.max_s,
            "weight_version": self._config.weight_version,
            "routing_ring_occupied": 0 if self._ring is None else self._ring.num_occupied,
            "routing_ring_waits": 0 if self._ring is None else self._ring.num_waits,
            "routing_ring_wait_s": 0.0 if self._ring is None else self._ring.wait_s,
        }
