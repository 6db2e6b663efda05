"""A leader's steps from their launch until they are committed, oldest first.

With `overlap_depth` 1 step k + 1 is launched before step k is committed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

from ..ipc.sockets import Sender
from ..plan import LaunchedT, NewReq, PeerMessage, Runner, ScheduleBatch, StepShape
from .req import Req
from .step_clock import StepClock
from .step_committer import StepCommitter
from .step_planner import StepPlan
from .step_recorder import StepRecorder
from .stop_checker import StopChecker


@dataclass(frozen=True)
class InFlight(Generic[LaunchedT]):
    """A launched step and its plan."""

    plan: StepPlan
    batch: ScheduleBatch
    launched: LaunchedT
    began: float


class StepPipeline(Generic[LaunchedT]):
    """Hands plans to the ranks of a leader's group, and their results to committer and recorder."""

    def __init__(
        self,
        runner: Runner[LaunchedT],
        peers: Sequence[Sender[PeerMessage]],
        stop_checker: StopChecker,
        committer: StepCommitter,
        recorder: StepRecorder,
        clock: StepClock,
        overlap_depth: int,
    ) -> None:
        self._runner = runner
        self._peers = peers
        self._stop_checker = stop_checker
        self._committer = committer
        self._recorder = recorder
        self._clock = clock
        self._overlap_depth = overlap_depth
        self._in_flight: deque[InFlight[LaunchedT]] = deque()
        self.num_steps = 0
        # Those of them that ran as CUDA graphs: of decodes, and of steps with prefills.
        self.num_decode_graphs = self.num_prefill_graphs = 0
        # The longest step so far, from its launch until its result was there.
        self.max_step_s = 0.0

    @property
    def is_empty(self) -> bool:
        return not self._in_flight

    def launch(self, plan: StepPlan, shape: StepShape) -> None:
        """Start a step on all ranks of the group."""
        for item in plan.planned:
            if item.scheduled.start == item.req.num_cached:
                self._runner.start_req(self._new_req(item.req))
        batch = plan.to_batch(self.num_steps, shape)
        self.num_steps += 1
        for peer in self._peers:
            peer.send(batch)
        self._recorder.begin_step()
        began = self._clock.begin_launch()
        self._in_flight.append(InFlight(plan, batch, self._runner.launch(batch), began))
        self._clock.end_launch(plan.mode)

    def _new_req(self, req: Req) -> NewReq:
        stop_ids = self._stop_checker.stop_ids(req)
        return NewReq(
            req.rid,
            req.row,
            bytes(req.tokens),
            req.num_prompt_tokens,
            req.params,
            req.options,
            stop_ids,
            req.constraint,
        )

    def commit_due(self) -> None:
        """Commit all but the youngest ones, which may overlap what comes next."""
        self._commit_down_to(self._overlap_depth)

    def commit_all(self) -> None:
        """Commit whatever is in flight."""
        self._commit_down_to(0)

    def _commit_down_to(self, depth: int) -> None:
        while len(self._in_flight) > depth:
            step = self._in_flight.popleft()
            result = self._runner.result(step.launched)
            self.max_step_s = max(self.max_step_s, time.perf_counter() - step.began)
            if result.graph is not None:
                self.num_decode_graphs += result.graph.is_decode
                self.num_prefill_graphs += not result.graph.is_decode
            committed = self._committer.commit(step.plan.planned, result)
            self._recorder.record_step(step.batch, committed)
