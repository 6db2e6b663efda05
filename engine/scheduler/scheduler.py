"""A leader's loop: receive -> plan -> agree -> launch -> commit.

It orders and delegates: the `Mailbox` says which messages are due, `StepPlanner` decides who runs, the leaders agree on
the step at a `Lockstep`, and a `StepPipeline` has it computed and commits it, one step later with `overlap_depth` 1.
`StepRecorder` tells the output processor what happened. The scheduler holds no tensor.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Generic

from ...parallel.moe.dispatch import SyncClock
from ..config import EngineConfig
from ..grammar.mask_maker import MaskMaker
from ..io_struct import FinishReason, ReqRetracted
from ..ipc.frontend_messages import (
    ControlReply,
    GetInternalStateReq,
    SeqNotice,
    ShutdownReq,
    TokenizedGenerateReqInput,
    TransferNotice,
)
from ..plan import LaunchedT, PageTransfers, Runner, StopPeers
from ..routing.ring import RouteRing
from .agreement import Agreement, Cause, Proposal, SingleRankSync, StepSync
from .leader_controls import LeaderControls, Operations
from .leader_setup import DpRankInfo, Endpoints
from .lockstep import Lockstep
from .mailbox import Mailbox
from .page_manager import PageManager
from .req import Req
from .request_queues import RequestQueues
from .step_clock import NANO, StepClock
from .step_committer import StepCommitter
from .step_limits import StepLimits
from .step_pipeline import StepPipeline
from .step_planner import StepPlan, StepPlanner
from .step_recorder import StepRecorder
from .stop_checker import StopChecker
from .transfer_ends import TransferEnds
from .transfer_sides import make_transfers

IDLE_WAIT_S = 5.0
# Between two looks at a grammar that is being compiled, or of a leader that others may wait for.
POLL_S = 0.001
# What is on its way from another engine ends with a message; or, without one, by its time limit.
TRANSFER_WAIT_S = 0.05


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
        dp: DpRankInfo | None = None,
        sync: StepSync | None = None,
        clock: SyncClock | None = None,
        operations: Operations | None = None,
        mask_maker: MaskMaker | None = None,
        page_transfers: PageTransfers | None = None,
    ) -> None:
        self._dp = dp = dp or DpRankInfo()
        self._endpoints = endpoints
        self._pages = pages
        self._mask_maker = mask_maker
        self._mailbox = Mailbox(endpoints.inbox)
        self.queues = RequestQueues(limits.max_running)
        self.recorder = StepRecorder(config, endpoints.records, dp)
        self._page_transfers = page_transfers
        self._transfers = make_transfers(config, page_transfers, endpoints.peers, self.recorder)
        self._planner = StepPlanner(self.queues, pages, limits, self._transfers)
        self.committer = StepCommitter(self.queues, pages, stop_checker, self._transfers)
        self._clock = StepClock(clock or SyncClock(), ring, endpoints.records)
        self.lockstep = Lockstep(sync or SingleRankSync(), dp.dp_rank)
        self.steps = StepPipeline(
            runner, endpoints.peers, stop_checker, self.committer, self.recorder, self._clock, config.overlap_depth
        )
        self._transfer_ends = TransferEnds(self.steps, pages, self.committer, self.recorder, mask_maker)
        self._controls = LeaderControls(
            self.steps,
            self.recorder,
            self.lockstep,
            self.queues,
            self._planner,
            self.committer,
            pages,
            endpoints,
            dp,
            operations,
        )
        self._plan = StepPlan()
        self._serving = True
        self._handlers = {**self._controls.handlers, **self._own_handlers()}

    def run(self) -> None:
        self._clock.garbage.install()
        while self._serving:
            self.receive()
            if self._serving and self.is_awake:
                self.step()
        self.steps.commit_all()
        for peer in self._endpoints.peers:
            peer.send(StopPeers())

    def step(self) -> None:
        """Plan a step, agree on it, launch it, and commit those that are due."""
        proposal = self.propose()
        agreement = self.lockstep.agree(proposal)
        self.proceed(agreement)

    @property
    def is_idle(self) -> bool:
        return self.steps.is_empty and len(self.queues) == 0

    @property
    def is_awake(self) -> bool:
        """Whether there is a step to agree on: a number that was not agreed on yet ends a sleep, nothing else."""
        return not self.lockstep.is_asleep or self._mailbox.seen > self.lockstep.agreement.num_seen

    # --- the parts of the loop --------------------------------------------------------------------------------------

    def receive(self) -> None:
        """Handle what is due; sleep for it when all leaders rest."""
        if self.lockstep.is_asleep:
            if self.steps.num_steps:
                self._clock.garbage.settle()
            self._mailbox.wait(IDLE_WAIT_S)
        began = time.perf_counter()
        self._mailbox.collect()
        cause = Cause.RECEIVE
        for message in self._mailbox.due(self.lockstep.agreement):
            self._handlers[type(message)](message)
            if not isinstance(message, (TokenizedGenerateReqInput, SeqNotice, TransferNotice)):
                cause = Cause.CONTROL
        received = time.perf_counter()
        self._clock.add(cause, received - began)
        self._transfer_ends.apply(self._transfers.settle())
        self._clock.add(Cause.TRANSFER, time.perf_counter() - received)

    def propose(self) -> Proposal:
        """Plan this leader's part of the next step, and say what the others must know of it."""
        may_run = self._controls.may_run
        self._plan = self._plan_step() if may_run else StepPlan()
        cause, cause_ns, forward_wait_ns = self._clock.take()
        return Proposal(
            num_tokens=self._plan.num_tokens,
            mode=self._plan.mode,
            num_reqs=len(self.queues),
            num_running=len(self.queues.running),
            is_pending=not self.steps.is_empty or self.recorder.has_events or (may_run and len(self.queues) > 0),
            seen=self._mailbox.seen,
            applied=self._mailbox.applied,
            cause=cause,
            cause_ns=cause_ns,
            agree_wait_ns=int(self.lockstep.wait_s * NANO),
            forward_wait_ns=forward_wait_ns,
        )

    def _plan_step(self) -> StepPlan:
        began = time.perf_counter()
        plan = self._planner.plan(in_flight=not self.steps.is_empty)
        self.recorder.note_all(plan.before)
        if plan.starved:
            # Committing may free pages.
            self.steps.commit_all()
            plan = self._planner.plan(in_flight=False)
            self.recorder.note_all(plan.before)
        if plan.transferring:
            planned = time.perf_counter()
            if self._transfers.admitted(plan.transferring):
                self.recorder.send_soon()
            self._clock.add(Cause.TRANSFER, time.perf_counter() - planned)
        # What was noted is sent first.
        is_at_rest = self.steps.is_empty and not (self.lockstep.agreement.num_tokens or self.recorder.has_events)
        if not plan.planned and is_at_rest and (self.queues.is_compiling or self._transfers.is_waiting):
            # Nobody has anything to do, on other dp ranks either: no reason to ask for the processor that others need.
            has_to_look = self.queues.is_compiling or self._dp.dp_size > 1
            self._mailbox.wait(POLL_S if has_to_look else TRANSFER_WAIT_S)
        if any(isinstance(event, ReqRetracted) for event in plan.before):
            self._clock.add(Cause.RETRACTION, time.perf_counter() - began)
        return plan

    def proceed(self, agreement: Agreement) -> None:
        """Run the step that was agreed on: a forward if anybody has tokens, then the commits that are due."""
        self.lockstep.adopt(agreement)
        self._controls.answer_pauses(agreement)
        if agreement.num_tokens:
            self.steps.launch(self._plan, self._dp.shape_of(agreement))
            self.steps.commit_due()
        else:
            self.steps.commit_all()
            if self.recorder.has_events:
                self.recorder.record_idle([])

    # --- messages ---------------------------------------------------------------------------------------------------

    def _own_handlers(self) -> dict[type, Callable[..., None]]:
        """By type of message; the others are the controls'."""
        return {
            TokenizedGenerateReqInput: self._on_generate,
            SeqNotice: self._on_notice,
            GetInternalStateReq: self._on_get_internal_state,
            ShutdownReq: self._on_shutdown,
            TransferNotice: self._transfers.on_notice,
        }

    def _on_generate(self, message: TokenizedGenerateReqInput) -> None:
        keys = bytearray(message.cache_ids) if message.images else None
        req = Req(message, tokens=bytearray(message.input_ids), image_keys=keys)
        req.num_scored = max(0, req.options.logprob_start_len)
        if req.params.grammar:
            assert self._mask_maker is not None, "grammars are refused at the edge where there is no tokenizer"
            after = req.params.grammar_begins_after
            req.constraint = self._mask_maker.start(req.params.grammar, None if after < 0 else after)
        refusal = self._transfers.begin(req)
        self.queues.add(req)
        self.recorder.note(req.started())
        if refusal:
            self._transfer_ends.end(req, FinishReason.failed(refusal))

    def _on_notice(self, message: SeqNotice) -> None:
        """The number is all that it says."""

    def _on_get_internal_state(self, message: GetInternalStateReq) -> None:
        state = self.state(check_pages=message.check_pages)
        self._endpoints.frontend.send(
            ControlReply(message.op_id, True, state=state, sync_waits=self.lockstep.stalls.waits())
        )

    def _on_shutdown(self, message: ShutdownReq) -> None:
        self._serving = False

    def state(self, *, check_pages: bool = True) -> dict[str, int | float | str]:
        """Counters and sizes of this dp rank."""
        if check_pages and self.is_idle:
            self._pages.check_integrity()
        return {
            "num_running": len(self.queues.running),
            "num_waiting": self.queues.num_waiting,
            "num_steps": self.steps.num_steps,
            "num_decode_graph_steps": self.steps.num_decode_graphs,
            "num_prefill_graph_steps": self.steps.num_prefill_graphs,
            "num_retractions": self._planner.num_retractions,
            **self._pages.state(),
            **self.committer.finish_cost.state(),
            **self._controls.state(),
            **self._clock.state(),
            **self._transfers.state(),
            **({} if self._page_transfers is None else self._page_transfers.counters()),
            "max_step_s": self.steps.max_step_s,
        }
