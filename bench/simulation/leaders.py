"""All leaders of an engine in one process: the real schedulers in lock-step, over a runner that computes by rule.

They take turns where in reality they run side by side, so each is timed by itself: CPU time of this thread, without the
runner's. What they send goes through real sockets (inproc).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import zmq

from waybill.engine.config import EngineConfig
from waybill.engine.frontend.leader_link import LeaderLink
from waybill.engine.io_struct import RingPlace, RoutingSetup
from waybill.engine.ipc.frontend_messages import BackendMessage, FrontendMessage
from waybill.engine.ipc.record_sender import RecordSender
from waybill.engine.ipc.sockets import Receiver, Sender
from waybill.engine.plan import NewReq, ScheduleBatch, StepResult
from waybill.engine.routing.ring import RouteRing
from waybill.engine.scheduler.agreement import Agreement, from_rows, to_row
from waybill.engine.scheduler.leader_setup import DpRankInfo, Endpoints
from waybill.engine.scheduler.page_manager import PageManager
from waybill.engine.scheduler.scheduler import Scheduler
from waybill.engine.scheduler.step_limits import StepLimits
from waybill.engine.scheduler.stop_checker import StopChecker
from waybill.parallel.dp_attention import rows_per_rank

from .rule import Rule
from .tape import Tape
from .workload import MAX_HISTORY, REQUESTS_PER_RANK

RECORDS = "inproc://records"
FRONTEND = "inproc://frontend"
RING_SLOTS = 8
ACQUIRE_TIMEOUT_S = 1.0


def make_config(dp_size: int, chunk: int) -> EngineConfig:
    return EngineConfig(
        model_path="simulation",
        dp_size=dp_size,
        max_running_requests=REQUESTS_PER_RANK,
        chunked_prefill_size=chunk,
        enable_return_routed_experts=True,
        routing_ring_slots=RING_SLOTS,
    )


class Capture:
    """The ring as the recording rank fills it: all ranks' rows side by side, in a slot that rank 0 acquires."""

    def __init__(self, ring: RouteRing, rule: Rule, dp_size: int) -> None:
        self._ring = ring
        self._rule = rule
        self._dp_size = dp_size
        self._target = np.empty(0)
        self.tape: Tape | None = None

    def write(self, dp_rank: int, batch: ScheduleBatch, tokens: np.ndarray, positions: np.ndarray) -> None:
        num_rows = batch.num_rows or batch.num_tokens
        if dp_rank == 0:
            seq = self._ring.acquire(ACQUIRE_TIMEOUT_S)
            assert seq == batch.step
            self._target = self._ring.slot(seq, num_rows * self._dp_size)
            if self.tape is not None:
                self.tape.last.num_slot_rows = num_rows * self._dp_size
        if len(tokens):
            first = dp_rank * num_rows
            entries = self._rule.entries(dp_rank, tokens, positions)
            self._target[:, first : first + len(tokens)] = self._rule.table[entries].transpose(1, 0, 2)
            if self.tape is not None:
                self.tape.last.places.append(np.arange(first, first + len(tokens)))
                self.tape.last.entries.append(entries)


class RuleRunner:
    """A device that knows the rule. `seconds` is the CPU time that it took, which no leader is to be charged for."""

    def __init__(self, dp_rank: int, rule: Rule, capture: Capture) -> None:
        self._dp_rank = dp_rank
        self._rule = rule
        self.capture = capture
        self._rids: dict[int, str] = {}
        self._last: dict[int, int] = {}
        self.seconds = 0.0

    def start_req(self, req: NewReq) -> None:
        self._rids[req.row] = req.rid

    def launch(self, batch: ScheduleBatch) -> StepResult:
        began = time.thread_time()
        tokens, positions, sampled = [], [], []
        for req in batch.reqs:
            end = req.start + req.num_tokens
            ids = np.frombuffer(req.input_ids, dtype="<i4") if req.input_ids else np.array([self._last[req.row]])
            tokens.append(ids)
            positions.append(np.arange(req.start, end))
            if req.sample:
                self._last[req.row] = self._rule.next_token(self._rids[req.row], end)
                sampled.append(self._last[req.row])
        empty = np.empty(0, dtype=np.int64)
        self.capture.write(self._dp_rank, batch, np.concatenate([empty, *tokens]), np.concatenate([empty, *positions]))
        self.seconds += time.thread_time() - began
        return StepResult(sampled, [0.0] * len(sampled), [[]] * len(sampled))

    def result(self, launched: StepResult) -> StepResult:
        return launched


@dataclass(frozen=True)
class Leader:
    scheduler: Scheduler[StepResult]
    runner: RuleRunner
    pages: PageManager


class Leaders:
    """`link` is what a frontend sends through; `host_s` are the seconds of the last step, one entry a leader."""

    def __init__(self, context: zmq.Context[Any], dp_size: int, rule: Rule, chunk: int, kv_tokens: int) -> None:
        self._kv_tokens = kv_tokens
        self.setups: list[RoutingSetup] = []
        self.config = make_config(dp_size, chunk)
        self._limits = StepLimits.resolve(chunk, MAX_HISTORY, REQUESTS_PER_RANK)
        slot_rows = rows_per_rank([self._limits.max_tokens], 1) * dp_size
        self.geometry = rule.geometry(slot_rows)
        self.ring = RouteRing.create(self.geometry, RING_SLOTS)
        self.capture = Capture(self.ring, rule, dp_size)
        self.leaders = [self._build(context, rank, rule) for rank in range(dp_size)]
        senders: list[Sender[FrontendMessage]] = [Sender(context, self._inbox(rank)) for rank in range(dp_size)]
        self.link = LeaderLink(senders)
        self.host_s = np.zeros(dp_size)
        self.agreement = Agreement()

    @staticmethod
    def _inbox(dp_rank: int) -> str:
        return f"inproc://leader{dp_rank}"

    def _build(self, context: zmq.Context[Any], dp_rank: int, rule: Rule) -> Leader:
        inbox: Receiver[FrontendMessage] = Receiver(context, self._inbox(dp_rank), FrontendMessage)
        # The simulation reads when it likes, on this thread.
        records = RecordSender(context, RECORDS, max_queued=0)
        frontend: Sender[BackendMessage] = Sender(context, FRONTEND)
        place = RingPlace(self.ring.path, self.ring.num_slots) if dp_rank == 0 else None
        self.setups.append(RoutingSetup(dp_rank, self._kv_tokens, self.config.page_size, self.geometry, place))
        records.send(self.setups[-1])
        pages = PageManager(self._kv_tokens, self.config.page_size, self.config.enable_prefix_cache)
        runner = RuleRunner(dp_rank, rule, self.capture)
        scheduler = Scheduler(
            self.config,
            self._limits,
            pages,
            StopChecker((), None),
            runner,
            Endpoints(inbox, [], records, frontend),
            self.ring if dp_rank == 0 else None,
            dp=DpRankInfo(dp_rank, self.config.dp_size),
        )
        return Leader(scheduler, runner, pages)

    def step(self) -> None:
        """One step of all leaders: every one plans, they agree, every one proceeds."""
        proposals = []
        for rank, leader in enumerate(self.leaders):
            began = time.thread_time()
            leader.scheduler.receive()
            proposals.append(to_row(leader.scheduler.propose()))
            self.host_s[rank] = time.thread_time() - began
        for rank, leader in enumerate(self.leaders):
            computed = leader.runner.seconds
            began = time.thread_time()
            # Every leader reads what the collective brought; the collective itself is not simulated.
            self.agreement = from_rows(proposals)
            leader.scheduler.proceed(self.agreement)
            self.host_s[rank] += time.thread_time() - began - (leader.runner.seconds - computed)

    def check_at_rest(self) -> None:
        """
        Raises:
            AssertionError: a page or a ring slot was not given back, or a request is left.
        """
        assert self.ring.num_occupied == 0, "ring slots were not given back"
        for leader in self.leaders:
            assert leader.scheduler.is_idle
            leader.pages.check_integrity()
