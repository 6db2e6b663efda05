"""A leader's loop: receive -> plan -> agree -> launch -> commit.

It orders and delegates: the `Mailbox` says which messages are due, `StepPlanner` decides who runs, the leaders agree on
the step, the runner computes, `StepCommitter` applies results, and every step's `StepRecord` tells the output processor
what happened. It holds no tensor. With `overlap_depth` 1 step k + 1 is planned and launched before step k is committed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic

from ...parallel.moe.dispatch import SyncClock
from ..config import EngineConfig
from ..io_struct import BeforeEvent, ReqFinished, ReqRetracted, StepRecord
from ..ipc.frontend_messages import ControlReply, GetInternalStateReq, SeqNotice, ShutdownReq, TokenizedGenerateReqInput
from ..plan import LaunchedT, NewReq, Runner, ScheduleBatch, StopPeers
from ..routing.ring import RouteRing
from .agreement import NO_AGREEMENT, Agreement, Cause, ForwardMode, Proposal, SingleRankSync, StepSync
from .leader_controls import LeaderControls, Operations
from .leader_setup import DpRankInfo, Endpoints
from .mailbox import Mailbox
from .page_manager import PageManager
from .req import Req
from .request_queues import RequestQueues
from .schedule_policy import StepLimits
from .step_committer import Committed, StepCommitter
from .step_planner import StepPlan, StepPlanner
from .stop_checker import StopChecker
from .sync_stalls import GarbageClock, SyncStalls, TurnLog

IDLE_WAIT_S = 5.0
NANO = 1e9


@dataclass(frozen=True)
class InFlight(Generic[LaunchedT]):
    """A launched step, its plan, and the events that its record begins with."""

    plan: StepPlan
    before: list[BeforeEvent]
    batch: ScheduleBatch
    launched: LaunchedT
    began: float


class Scheduler(Generic[LaunchedT]):
    """One dp rank's leader. `run` returns after a `ShutdownReq`."""

    def __init__(
        self,
        config: EngineConfig,
        limits: StepLimits,
        pages: PageManager,
        stop_checker: StopChecker,
        runner: Runner[LaunchedT],
        endpoints: Endpoints,
        ring: RouteRing | None = None,
        *,
        place: DpRankInfo | None = None,
        sync: StepSync | None = None,
        clock: SyncClock | None = None,
        operations: Operations | None = None,
    ) -> None:
        self._config = config
        self._pages = pages
        self._stop_checker = stop_checker
        self._runner = runner
        self._endpoints = endpoints
        self._ring = ring
        self._place = place or DpRankInfo()
        self._sync = sync or SingleRankSync()
        self._mailbox = Mailbox(endpoints.inbox)
        self.queues = RequestQueues(limits.max_running)
        self._planner = StepPlanner(self.queues, pages, limits)
        self.committer = StepCommitter(self.queues, pages, stop_checker)
        self._plan = StepPlan()
        self._agreement = NO_AGREEMENT
        self._is_asleep = False
        self._in_flight: deque[InFlight[LaunchedT]] = deque()
        self._before: list[BeforeEvent] = []
        self._num_steps = 0
        self._num_records = 0
        self._num_received = 0
        self._serving = True
        self._controls = LeaderControls(
            self,
            self.queues,
            self._planner,
            self.committer,
            pages,
            endpoints,
            self._place,
            operations,
            config.weight_version,
        )
        self.stalls = SyncStalls(self._place.dp_rank)
        self._clock = clock or SyncClock()
        self._garbage = GarbageClock()
        self._turn_log = TurnLog()
        self._agree_wait_s = 0.0
        self._forward_wait_s = 0.0
        # The longest step so far, from its launch until its result was there.
        self._max_step_s = 0.0
        self._handlers: dict[type, Callable[..., None]] = {
            TokenizedGenerateReqInput: self._on_generate,
            SeqNotice: self._on_notice,
            GetInternalStateReq: self._on_get_internal_state,
            ShutdownReq: self._on_shutdown,
            **self._controls.handlers,
        }

    def run(self) -> None:
        self._garbage.install()
        while self._serving:
            self.receive()
            if self._serving and self.is_awake:
                self.step()
        self._commit_down_to(0)
        for peer in self._endpoints.peers:
            peer.send(StopPeers())

    def receive(self) -> None:
        """Handle what is due; sleep for it when all leaders rest."""
        if self._is_asleep:
            if self._num_steps:
                self._garbage.settle()
            self._mailbox.wait(IDLE_WAIT_S)
        began = time.perf_counter()
        self._mailbox.collect()
        cause = Cause.RECEIVE
        for message in self._mailbox.due(self._agreement):
            self._handlers[type(message)](message)
            if not isinstance(message, (TokenizedGenerateReqInput, SeqNotice)):
                cause = Cause.CONTROL
        self._turn_log.add(cause, time.perf_counter() - began)

    @property
    def is_idle(self) -> bool:
        return not self._in_flight and len(self.queues) == 0

    @property
    def is_awake(self) -> bool:
        """Whether there is a step to agree on: a number that was not agreed on yet ends a sleep, nothing else."""
        return not self._is_asleep or self._mailbox.seen > self._agreement.num_seen

    def step(self) -> None:
        """Plan a step, agree on it, launch it, and commit those that are due."""
        proposal = self.propose()
        began = time.perf_counter()
        agreement = self._sync.agree(proposal)
        self._agree_wait_s = time.perf_counter() - began
        self.proceed(agreement)

    # --- steps ------------------------------------------------------------------------------------------------------

    def propose(self) -> Proposal:
        """Plan this leader's part of the next step, and tell the others."""
        began = time.perf_counter()
        may_run = self._controls.may_run
        self._plan = self._planner.plan(in_flight=bool(self._in_flight)) if may_run else StepPlan()
        if self._plan.starved:
            # Committing may free pages.
            self._before.extend(self._plan.before)
            self._commit_down_to(0)
            self._plan = self._planner.plan(in_flight=False)
        if any(isinstance(event, ReqRetracted) for event in self._plan.before):
            self._turn_log.add(Cause.RETRACTION, time.perf_counter() - began)
        self._turn_log.add(Cause.GARBAGE_COLLECTION, self._garbage.take())
        cause, seconds = self._turn_log.take()
        return Proposal(
            num_tokens=self._plan.num_tokens,
            mode=self._plan.mode,
            num_reqs=len(self.queues),
            num_running=len(self.queues.running),
            is_pending=bool(self._in_flight or self._before or self._plan.before or (may_run and len(self.queues))),
            seen=self._mailbox.seen,
            applied=self._mailbox.applied,
            cause=cause,
            cause_ns=int(seconds * NANO),
            agree_wait_ns=int(self._agree_wait_s * NANO),
            forward_wait_ns=int(self._forward_wait_s * NANO),
        )

    def proceed(self, agreement: Agreement) -> None:
        """Run the step that was agreed on: a forward if anybody has tokens, then the commits that are due."""
        self._agreement = agreement
        self._controls.answer_pauses(agreement)
        self.stalls.observe(agreement.proposals)
        self._forward_wait_s = 0.0
        if agreement.num_tokens:
            self._launch(agreement)
            self._commit_down_to(self._config.overlap_depth)
        else:
            self._before.extend(self._plan.before)
            self._commit_down_to(0)
            if self._before:
                self.record_idle([])
        self._is_asleep = agreement.may_sleep

    def _launch(self, agreement: Agreement) -> None:
        plan = self._plan
        for item in plan.planned:
            if item.scheduled.start == item.req.num_cached:
                self._runner.start_req(self._new_req(item.req))
        num_rows = agreement.rows_per_rank(self._place.tp_size) if self._place.dp_size > 1 else 0
        batch = plan.to_batch(self._num_steps, num_rows)
        self._num_steps += 1
        for peer in self._endpoints.peers:
            peer.send(batch)
        before, self._before = self._before + plan.before, []
        began, waited, ring_waited = time.perf_counter(), self._clock.seconds, self._ring_wait_s
        self._in_flight.append(InFlight(plan, before, batch, self._runner.launch(batch), began))
        self._forward_wait_s = self._clock.seconds - waited
        self._turn_log.add(Cause.RING_FULL, self._ring_wait_s - ring_waited)
        own = time.perf_counter() - began - self._forward_wait_s
        self._turn_log.add(Cause.PREFILL if plan.mode == ForwardMode.PREFILL else Cause.DECODE, own)

    def _new_req(self, req: Req) -> NewReq:
        stop_ids = self._stop_checker.stop_ids(req)
        return NewReq(req.rid, req.row, bytes(req.tokens), req.num_prompt_tokens, req.params, req.options, stop_ids)

    @property
    def _ring_wait_s(self) -> float:
        return 0.0 if self._ring is None else self._ring.wait_s

    def _commit_down_to(self, depth: int) -> None:
        """Commit the oldest steps until at most `depth` are in flight."""
        while len(self._in_flight) > depth:
            step = self._in_flight.popleft()
            result = self._runner.result(step.launched)
            self._max_step_s = max(self._max_step_s, time.perf_counter() - step.began)
            committed = self.committer.commit(step.plan.planned, result)
            ring_seq = step.batch.step if self._config.enable_return_routed_experts else -1
            self._record(step.before, committed, ring_seq, self._place.first_row(step.batch.num_rows))

    @property
    def agreement(self) -> Agreement:
        """The last one."""
        return self._agreement

    def commit_all(self) -> None:
        """Commit whatever is in flight."""
        self._commit_down_to(0)

    def note(self, event: BeforeEvent) -> None:
        """The next record begins with it."""
        self._before.append(event)

    @property
    def has_notes(self) -> bool:
        return bool(self._before)

    def record_idle(self, finished: list[ReqFinished]) -> None:
        """A record without a forward; what is in flight must have been committed, or the order would be wrong."""
        assert not self._in_flight
        before, self._before = self._before, []
        self._record(before, Committed([], [], finished))

    def _record(self, before: list[BeforeEvent], committed: Committed, ring_seq: int = -1, first_row: int = 0) -> None:
        waited = self._endpoints.records.wait_s
        self._endpoints.records.send(
            StepRecord(
                dp_rank=self._place.dp_rank,
                step=self._num_records,
                ring_seq=ring_seq,
                first_row=first_row,
                weight_version=self._controls.weight_version,
                before=before,
                segments=committed.segments,
                outputs=committed.outputs,
                after=committed.finished,
            )
        )
        if self._endpoints.records.wait_s > waited:
            self._turn_log.add(Cause.RING_FULL, self._endpoints.records.wait_s - waited)
        self._num_records += 1

    # --- messages ---------------------------------------------------------------------------------------------------

    def _on_generate(self, message: TokenizedGenerateReqInput) -> None:
        req = Req(message, arrival=self._num_received, tokens=bytearray(message.input_ids))
        req.num_scored = max(0, req.options.logprob_start_len)
        self._num_received += 1
        self.queues.add(req)
        self._before.append(req.started())

    def _on_notice(self, message: SeqNotice) -> None:
        """The number is all that it says."""

    def _on_get_internal_state(self, message: GetInternalStateReq) -> None:
        self._endpoints.frontend.send(
            ControlReply(message.op_id, True, state=self.state(), sync_waits=self.stalls.waits())
        )

    def _on_shutdown(self, message: ShutdownReq) -> None:
        self._serving = False

    def state(self) -> dict[str, int | float | str]:
        """Counters and sizes of this dp rank."""
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
            **self._controls.state(),
            "garbage_pauses": self._garbage.num_pauses,
            "garbage_pause_s": self._garbage.seconds,
            "routing_ring_occupied": 0 if self._ring is None else self._ring.num_occupied,
            "routing_ring_waits": 0 if self._ring is None else self._ring.num_waits,
            "routing_ring_wait_s": 0.0 if self._ring is None else self._ring.wait_s,
            "record_waits": self._endpoints.records.num_waits,
            "record_wait_s": self._endpoints.records.wait_s,
            "max_step_s": self._max_step_s,
        }
