"""A replica without a model: the real scheduler, planner, committer and pages over a runner that computes tokens by rule.

The rule makes the next token a function of the sequence alone, so that a right scheduler yields the same output whatever
the batching, chunking, caching and retractions were. The runner also checks what a device would corrupt silently: that
each step continues where the KV of its request ends, on pages that hold exactly its tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from waybill.engine.config import EngineConfig
from waybill.engine.io_struct import ReqAdmitted, ReqFinished, ReqRetracted, ReqStarted, SamplingParams, StepRecord
from waybill.engine.ipc.frontend_messages import FrontendMessage, TokenizedGenerateReqInput
from waybill.engine.plan import NewReq, PageTransfers, ScheduleBatch, StepResult
from waybill.engine.scheduler.leader_setup import Endpoints
from waybill.engine.scheduler.page_manager import PageManager
from waybill.engine.scheduler.scheduler import Scheduler
from waybill.engine.scheduler.step_limits import StepLimits
from waybill.engine.scheduler.stop_checker import StopChecker

VOCAB = 50
EOS = 0


def next_token(tokens: list[int]) -> int:
    """A rule that depends on the whole sequence and hits EOS now and then."""
    return (sum((i + 1) * t for i, t in enumerate(tokens)) * 7919 + len(tokens)) % VOCAB


def expected_output(prompt: list[int], max_new_tokens: int, ignore_eos: bool = False) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_new_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] == EOS and not ignore_eos:
            break
    return tokens[len(prompt) :]


@dataclass
class FakeInbox:
    messages: deque[FrontendMessage] = field(default_factory=deque)

    def wait(self, timeout_s: float) -> bool:
        return bool(self.messages)

    def receive_nowait(self) -> FrontendMessage | None:
        return self.messages.popleft() if self.messages else None


@dataclass
class FakeSender:
    sent: list[object] = field(default_factory=list)
    num_waits: int = 0
    wait_s: float = 0.0

    def send(self, message: object, frames: object = ()) -> None:
        self.sent.append(message)


@dataclass(frozen=True)
class FakeStep:
    token_ids: list[int]
    failures: dict[int, str] = field(default_factory=dict)


class FakeRunner:
    """Keeps, per KV slot, the token and position whose KV a device would hold there.

    `fail_at` are positions, by rid, whose keys and values are NaN: a step fails that computes or reads one.
    """

    def __init__(self, num_pages: int, page_size: int, max_running: int, max_pages: int, max_tokens: int) -> None:
        self._page_size = page_size
        self._max_tokens = max_tokens
        self._kv: dict[int, tuple[int, int]] = {}
        self._table = np.full((max_running, max_pages), -1)
        self._last: dict[int, int] = {}
        self.fail_at: dict[str, int] = {}
        self._rids: dict[int, str] = {}
        self._nan_slots: set[int] = set()

    def start_req(self, req: NewReq) -> None:
        self._last.pop(req.row, None)
        self._rids[req.row] = req.rid

    def launch(self, batch: ScheduleBatch) -> FakeStep:
        # A leader without tokens of its own joins where every rank holds rows.
        assert batch.num_tokens > 0 or batch.num_rows > 0, "a step without work"
        assert batch.num_tokens <= self._max_tokens, "a step is larger than its buffers"
        token_ids = []
        failures = {}
        for index, req in enumerate(batch.reqs):
            pages = np.frombuffer(req.pages, dtype="<i4")
            self._table[req.row, req.first_page : req.first_page + len(pages)] = pages
            ids = np.frombuffer(req.input_ids, dtype="<i4").tolist() if req.input_ids else [self._last[req.row]]
            assert len(ids) == req.num_tokens
            for position, token in zip(range(req.start, req.start + req.num_tokens), ids, strict=True):
                slot = self._slot(req.row, position)
                self._kv[slot] = (token, position)
                is_nan = self.fail_at.get(self._rids[req.row]) == position
                (self._nan_slots.add if is_nan else self._nan_slots.discard)(slot)
            if any(self._slot(req.row, position) in self._nan_slots for position in range(req.start + req.num_tokens)):
                failures[index] = "not finite"
            if req.sample:
                context = [self._kv[self._slot(req.row, p)] for p in range(req.start + req.num_tokens)]
                assert [position for _, position in context] == list(range(len(context))), "KV of another position"
                self._last[req.row] = next_token([token for token, _ in context])
                token_ids.append(self._last[req.row])
        return FakeStep(token_ids, failures)

    def _slot(self, row: int, position: int) -> int:
        page = int(self._table[row, position // self._page_size])
        assert page >= 0
        return page * self._page_size + position % self._page_size

    def result(self, launched: FakeStep) -> StepResult:
        num = len(launched.token_ids)
        return StepResult(launched.token_ids, [0.0] * num, [[]] * num, failures=launched.failures)


class Replica:
    """A scheduler with fakes around it, and what its records add up to."""

    def __init__(
        self,
        config: EngineConfig,
        num_pages: int,
        context_length: int = 4096,
        page_transfers: PageTransfers | None = None,
    ) -> None:
        limits = StepLimits.resolve(config.chunked_prefill_size, context_length, config.max_running_requests)
        max_pages = -(-context_length // config.page_size)
        self.inbox, self.records, self.frontend = FakeInbox(), FakeSender(), FakeSender()
        self.pages = PageManager(num_pages, config.page_size, config.enable_prefix_cache)
        self.runner = FakeRunner(num_pages, config.page_size, limits.max_running, max_pages, limits.max_tokens)
        self.scheduler: Scheduler[FakeStep] = Scheduler(
            config,
            limits,
            self.pages,
            StopChecker((EOS,), None),
            self.runner,
            Endpoints(self.inbox, [], self.records, self.frontend),
            page_transfers=page_transfers,
        )
        self.outputs: dict[str, list[int]] = {}
        self.finished: dict[str, ReqFinished] = {}
        self.cached: dict[str, int] = {}
        self.num_rows: dict[str, int] = {}
        self.retracted: list[str] = []
        self._page_size = config.page_size
        self._filed: dict[str, int] = {}
        self._num_read = 0
        self._num_sent = 0

    def submit(self, rid: str, prompt: list[int], params: SamplingParams, **fields: object) -> None:
        ids = np.array(prompt, dtype="<i4").tobytes()
        self.send(lambda number: TokenizedGenerateReqInput(number, rid, ids, params, **fields))

    def send(self, make: Callable[[int], FrontendMessage]) -> None:
        """A message with the next number."""
        self._num_sent += 1
        self.inbox.messages.append(make(self._num_sent))

    def turn(self) -> None:
        """One turn of the leader's loop, its records read as the output processor reads them."""
        self.scheduler.receive()
        if self.scheduler.is_awake:
            self.scheduler.step()
        for record in self.records.sent[self._num_read :]:
            self._read(record)
        self._num_read = len(self.records.sent)

    def run_until_idle(self, max_turns: int = 100_000) -> None:
        for _ in range(max_turns):
            self.turn()
            if not self.scheduler.is_awake and not self.inbox.messages:
                assert self.scheduler.is_idle
                self.pages.check_integrity()
                return
        raise AssertionError("the scheduler does not come to rest")

    def _read(self, record: StepRecord) -> None:
        for event in record.before:
            if isinstance(event, ReqStarted):
                self.outputs[event.rid] = []
                self._filed[event.rid] = 0
            elif isinstance(event, ReqAdmitted):
                self._filed[event.rid] = len(event.cached_pages) // 4 * self._page_size
                self.cached.setdefault(event.rid, self._filed[event.rid])
            elif isinstance(event, ReqRetracted):
                self.retracted.append(event.rid)
        for segment in record.segments:
            if not segment.discarded:
                assert segment.start == self._filed[segment.rid], "rows have a gap or overlap"
                self._filed[segment.rid] += segment.num_tokens
        for output in record.outputs:
            self.outputs[output.rid] += output.token_ids
        for finished in record.after:
            assert finished.rid not in self.finished
            self.finished[finished.rid] = finished
            self.num_rows[finished.rid] = self._filed[finished.rid]
