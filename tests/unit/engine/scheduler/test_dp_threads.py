"""Several leaders as threads: the loop itself, with a barrier for the agreement."""

from __future__ import annotations

import gc
import queue
import threading
from collections import deque
from typing import Any

from support.replica_harness import EOS, FakeRunner, FakeSender

from waybill.engine.config import EngineConfig
from waybill.engine.frontend.leader_link import LeaderLink
from waybill.engine.io_struct import SamplingParams, StepRecord
from waybill.engine.ipc.frontend_messages import (
    AbortReq,
    FrontendMessage,
    ShutdownReq,
    TokenizedGenerateReqInput,
)
from waybill.engine.scheduler.agreement import Agreement, Proposal
from waybill.engine.scheduler.leader_setup import DpRankInfo, Endpoints
from waybill.engine.scheduler.page_manager import PageManager
from waybill.engine.scheduler.scheduler import Scheduler
from waybill.engine.scheduler.step_limits import StepLimits
from waybill.engine.scheduler.stop_checker import StopChecker

PAGE_SIZE = 4


class BarrierSync:
    """Threads that agree at a barrier."""

    def __init__(self, dp_size: int) -> None:
        self._barrier = threading.Barrier(dp_size, timeout=60.0)
        self._proposals: list[Proposal | None] = [None] * dp_size

    def at(self, dp_rank: int) -> Any:
        sync = self

        class Seat:
            def agree(self, proposal: Proposal) -> Agreement:
                sync._proposals[dp_rank] = proposal
                sync._barrier.wait()
                agreement = Agreement(tuple(sync._proposals))
                # Nobody may bring the next proposal before all have read this one's.
                sync._barrier.wait()
                return agreement

        return Seat()


class QueueInbox:
    """An inbox that a thread can sleep on."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[FrontendMessage] = queue.SimpleQueue()
        self._next: deque[FrontendMessage] = deque()

    def send(self, message: FrontendMessage) -> None:
        self._queue.put(message)

    def flush_and_close(self, timeout_s: float) -> None: ...

    def wait(self, timeout_s: float) -> bool:
        if not self._next:
            try:
                self._next.append(self._queue.get(timeout=timeout_s))
            except queue.Empty:
                return False
        return True

    def receive_nowait(self) -> FrontendMessage | None:
        if self._next:
            return self._next.popleft()
        return None if self._queue.empty() else self._queue.get()


class RecordsQueue:
    def __init__(self) -> None:
        self.sent: list[StepRecord] = []
        self.finished: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.num_waits, self.wait_s = 0, 0.0

    def send(self, message: StepRecord, frames: object = ()) -> None:
        self.sent.append(message)
        for finished in message.after:
            self.finished.put(finished.rid)


def test_the_loop_on_threads_sleeps_wakes_and_ends() -> None:
    """`Scheduler.run` itself: requests come while the leaders sleep, while they run, and at the end a shutdown."""
    dp_size, num_rounds = 3, 30
    config = EngineConfig(model_path="", dp_size=dp_size, page_size=PAGE_SIZE, max_running_requests=4, overlap_depth=1)
    limits = StepLimits.resolve(16, 256, 4)
    sync = BarrierSync(dp_size)
    inboxes = [QueueInbox() for _ in range(dp_size)]
    records = [RecordsQueue() for _ in range(dp_size)]
    pages = [PageManager(64, PAGE_SIZE, True) for _ in range(dp_size)]
    schedulers = [
        Scheduler(
            config,
            limits,
            pages[rank],
            StopChecker((EOS,), None),
            FakeRunner(64, PAGE_SIZE, 4, 64, limits.max_tokens),
            Endpoints(inboxes[rank], [], records[rank], FakeSender()),
            dp=DpRankInfo(rank, dp_size),
            sync=sync.at(rank),
        )
        for rank in range(dp_size)
    ]
    threads = [threading.Thread(target=scheduler.run, daemon=True) for scheduler in schedulers]
    for thread in threads:
        thread.start()
    link = LeaderLink(inboxes)
    params = SamplingParams(max_new_tokens=5, ignore_eos=True)
    ids = b"".join(number.to_bytes(4, "little") for number in (1, 2, 3))
    for turn in range(num_rounds):
        rank = turn % dp_size
        rid = f"r{turn}"
        link.send(rank, lambda number, rid=rid: TokenizedGenerateReqInput(number, rid, ids, params))
        if turn % 3:
            # Every third request meets one that still runs; the others find the leaders asleep, or about to be.
            assert records[rank].finished.get(timeout=30.0) == rid
        if turn % 7 == 0:
            link.send_to_all(lambda number: AbortReq(number, rid="nobody"))
    link.send_to_all(ShutdownReq)
    for thread in threads:
        thread.join(timeout=30.0)
        assert not thread.is_alive()
    # At the first rest after the first steps each leader froze what is alive; this process has other tests to run.
    assert gc.get_freeze_count() > 0
    gc.unfreeze()
    for scheduler in schedulers:
        gc.callbacks.remove(scheduler._clock.garbage._on_collection)
    lengths = [len([record for record in leader.sent if record.ring_seq >= 0 or record.segments]) for leader in records]
    assert len({scheduler.steps.num_steps for scheduler in schedulers}) == 1
    assert all(length <= schedulers[0].steps.num_steps for length in lengths)
