"""Plans a step: which requests run, on which pages. Pure host code, tested without a model.

Order of claims on pages: running decodes first, then running prefills, then admissions by priority and arrival. When a
running request finds no page, the youngest one is retracted (preempted): it gives up its pages and waits, keeping its
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..io_struct import BeforeEvent, ReqAdmitted, ReqRetracted, Segment
from ..kv_cache.page_pool import Pages
from ..plan import Draw, ScheduleBatch, ScheduledReq, StepShape
from ..vision.placed_image import images_within
from .agreement import ForwardMode
from .page_manager import PageManager
from .req import Req
from .request_queues import RequestQueues
from .shared_prefills import SharedPrefills
from .step_limits import PrefillBudget, StepLimits, admission_fits
from .transfers import NoTransfers, Transfers


@dataclass(frozen=True)
class PlannedReq:
    """A request's part in a planned step, kept by the leader until the step commits."""

    req: Req
    segment: Segment
    scheduled: ScheduledReq


@dataclass
class StepPlan:
    """What a planning pass decided. `starved` says that it stopped for want of pages while steps are in flight, whose
    commit may free some: the caller commits them and plans again."""

    planned: list[PlannedReq] = field(default_factory=list)
    before: list[BeforeEvent] = field(default_factory=list)
    # Admitted with all pages of their prompts: another engine reads those, or this one fetches them.
    transferring: list[Req] = field(default_factory=list)
    starved: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(item.scheduled.num_tokens for item in self.planned)

    @property
    def mode(self) -> ForwardMode:
        if not self.planned:
            return ForwardMode.IDLE
        if any(item.scheduled.images for item in self.planned):
            return ForwardMode.IMAGES
        are_decodes = all(item.scheduled.num_tokens == 1 and item.scheduled.sample for item in self.planned)
        return ForwardMode.DECODE if are_decodes else ForwardMode.PREFILL

    def to_batch(self, step: int, shape: StepShape) -> ScheduleBatch:
        reqs = [item.scheduled for item in self.planned]
        return ScheduleBatch(step, reqs, shape.num_rows, shape.is_decode, shape.has_images, plain_draws(self.planned))


def plain_draws(planned: Sequence[PlannedReq]) -> list[Draw]:
    """Of the requests that sample, if none of them asks for more than a temperature and the token's log-probability."""
    draws = []
    for item in planned:
        scheduled = item.scheduled
        if scheduled.sample:
            plain, place = item.req.plain, scheduled.start + scheduled.num_tokens
            if plain is None or place < plain.first_free:
                return []
            temperature, seed, with_logprob, num_prompt_tokens, _ = plain
            draws.append(Draw(temperature, seed, place - num_prompt_tokens, with_logprob))
    return draws


class StepPlanner:
    """Decides, step by step, what runs next."""

    def __init__(
        self, queues: RequestQueues, pages: PageManager, limits: StepLimits, transfers: Transfers | None = None
    ) -> None:
        self._queues = queues
        self._pages = pages
        self._limits = limits
        self._transfers = transfers or NoTransfers()
        self._shared_prefills = SharedPrefills(pages)
        self.num_retractions = 0

    def plan(self, *, in_flight: bool) -> StepPlan:
        """One step's plan; empty when nothing can run.

        Args:
            in_flight: whether a step is launched and not committed. Nobody is retracted then: see `StepPlan.starved`.
        """
        plan = StepPlan()
        self._plan_decodes(plan, in_flight)
        if plan.starved:
            assert not plan.planned, "a decode that starves leaves the plan untouched"
            return plan
        budget = PrefillBudget(self._limits)
        self._plan_running_prefills(plan, budget, in_flight, {item.req for item in plan.planned})
        if not plan.starved and not any(isinstance(event, ReqRetracted) for event in plan.before):
            self._plan_admissions(plan, budget)
        return plan

    def retract_running(self) -> list[BeforeEvent]:
        """Everybody gives up their pages and waits; no step may be in flight."""
        plan = StepPlan()
        while self._queues.running:
            self._retract(self._queues.youngest_running(), plan)
        return plan.before

    def _plan_decodes(self, plan: StepPlan, in_flight: bool) -> None:
        decoding = [req for req in self._queues.running if req.is_decoding and not req.is_exhausted]
        needed = sum(self._pages.pages_missing(req, 1) for req in decoding)
        while needed > self._pages.num_available:
            if in_flight:
                plan.starved = True
                return
            victim = self._queues.youngest_running()
            self._retract(victim, plan)
            decoding = [req for req in decoding if req is not victim]
            needed = sum(self._pages.pages_missing(req, 1) for req in decoding)
        for req in decoding:
            self._schedule(req, 1, plan)

    def _plan_running_prefills(self, plan: StepPlan, budget: PrefillBudget, in_flight: bool, decoded: set[Req]) -> None:
        for req in sorted(self._queues.running, key=lambda item: item.order):
            if not req.is_running or req.num_remaining == 0 or req.is_exhausted or req in decoded:
                continue
            num_tokens = budget.grant(req.num_remaining)
            if num_tokens == 0:
                return
            if self._pages.pages_missing(req, num_tokens) > self._pages.num_available:
                # Decodes go on and free pages in time; only when nothing else runs must somebody give way.
                if plan.planned or in_flight:
                    plan.starved = in_flight and not plan.planned
                    return
                self._make_room(req, num_tokens, plan)
                if not req.is_running:
                    return
            self._schedule(req, num_tokens, plan)
            budget.spend(num_tokens)

    def _make_room(self, req: Req, num_tokens: int, plan: StepPlan) -> None:
        """Retract from the young end until `req` has its pages; `req` itself is the last to go."""
        while req.is_running and self._pages.pages_missing(req, num_tokens) > self._pages.num_available:
            self._retract(self._queues.youngest_running(), plan)

    def _plan_admissions(self, plan: StepPlan, budget: PrefillBudget) -> None:
        for req in self._queues.waiting_in_order():
            if len(self._queues.running) >= self._limits.max_running:
                return
            if req.is_compiling or self._shared_prefills.still_waits(req):
                continue
            self._pages.match(req)
            if self._shared_prefills.must_wait(req, self._queues.running):
                self._unmatch(req)
                continue
            num_tokens = 0 if req.is_awaited else budget.grant(req.num_remaining)
            # Pages that another engine reads or writes are taken all at once, so that nobody has to give them up.
            reserved = req.num_remaining if req.is_awaited or req.is_lent else num_tokens
            num_pages = self._pages.pages_missing(req, reserved)
            fits = admission_fits(num_pages, self._pages.num_available, len(self._queues.running))
            if not fits or num_pages > self._pages.num_available or not (num_tokens or req.is_awaited):
                self._unmatch(req)
                return
            self._queues.start(req)
            plan.before.append(ReqAdmitted(req.rid, req.held.pages.tobytes()))
            if req.is_awaited or req.is_lent:
                plan.transferring.append(req)
            if req.is_awaited:
                req.held.pages.extend(self._take(num_pages))
                req.num_scheduled += reserved
                continue
            self._schedule(req, num_tokens, plan, num_pages)
            budget.spend(num_tokens)

    def _unmatch(self, req: Req) -> None:
        self._pages.release(req)
        req.leave_pool()

    def _take(self, num_pages: int) -> Pages[int]:
        new_pages = self._pages.take(num_pages)
        assert new_pages is not None, "the caller has seen that the pages are there"
        return new_pages

    def _schedule(self, req: Req, num_tokens: int, plan: StepPlan, num_pages: int | None = None) -> None:
        """With as many new pages as its tokens need, or more."""
        start, end = req.num_scheduled, req.num_scheduled + num_tokens
        new_pages = self._take(self._pages.pages_missing(req, num_tokens) if num_pages is None else num_pages)
        first_page = len(req.held.pages)
        if start == req.num_cached:
            # Its first chunk: the device does not know the cached pages yet.
            first_page, table_pages = 0, req.held.pages + new_pages
        else:
            table_pages = new_pages
        req.held.pages.extend(new_pages)
        is_last = end == req.num_prompt_tokens + req.num_sampled
        sample = is_last and req.params.max_new_tokens > 0
        score_from, scored_ids = self._rows_to_score(req, start, end)
        delta, images = images_within(req.recv.images, start, end) if req.recv.images else (0, [])
        scheduled = ScheduledReq(
            row=req.row,
            start=start,
            num_tokens=num_tokens,
            input_ids=req.token_bytes(start, end) if end <= req.seqlen else b"",
            first_page=first_page,
            pages=table_pages.tobytes(),
            sample=sample,
            prompt_logprobs_from=score_from,
            prompt_logprob_ids=scored_ids,
            rope_delta=delta,
            images=images,
        )
        req.num_scheduled = end
        req.num_sampled += sample
        plan.planned.append(PlannedReq(req, Segment(req.rid, start, num_tokens, new_pages.tobytes()), scheduled))

    @staticmethod
    def _rows_to_score(req: Req, start: int, end: int) -> tuple[int, bytes]:
        """The first row of this chunk whose logits score a prompt token, and the ids that it and those after it score:
        position p scores p + 1."""
        if not req.options.returns_prompt_logprobs:
            return 0, b""
        first = max(start, max(req.options.logprob_start_len, req.num_scored, 1) - 1)
        last = min(end, req.num_prompt_tokens - 1)
        return (first - start, req.token_bytes(first + 1, last + 1)) if first < last else (0, b"")

    def _retract(self, victim: Req, plan: StepPlan) -> None:
        """Preemption: the victim gives up its pages. Never one that is part of the plan at hand or of a step in flight."""
        assert all(item.req is not victim for item in plan.planned)
        plan.before.append(ReqRetracted(victim.rid))
        self._transfers.left(victim)
        self._pages.release(victim)
        self._queues.retract(victim)
        self.num_retractions += 1
