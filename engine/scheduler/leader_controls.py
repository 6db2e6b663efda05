"""A leader's half of control operations: aborts, the prefix cache, pauses, weights and memory.

All leaders apply an operation at the same step and come to the same outcome, from the operation and what the agreement
says of all of them; the first one answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ..control.blocked import Blocked
from ..control.operations import (
    ContinueGeneration,
    ControlOperation,
    DestroyWeightsUpdateGroup,
    FlushCache,
    PauseGeneration,
    ReleaseMemoryOccupation,
    UpdateWeightsFromDistributed,
    UpdateWeightVersion,
    WeightUpdate,
)
from ..io_struct import CacheFlushed, FinishReason, ReqFinished
from ..ipc.frontend_messages import ABORTED_BY_PAUSE, AbortReq, ControlReply, ControlReq
from ..plan import PeerOperation
from ..weight_sync.report import Outcome
from .agreement import Agreement
from .leader_setup import DpRankInfo, Endpoints
from .lockstep import Lockstep
from .page_manager import PageManager
from .request_queues import RequestQueues
from .step_committer import StepCommitter
from .step_planner import StepPlanner
from .step_recorder import StepRecorder


class Operations(Protocol):
    """What this rank does when all ranks are told to."""

    @property
    def blocked(self) -> Blocked | None:
        """Why nobody may generate; None if nothing stands against it."""
        ...

    def run(self, op_id: str, op: ControlOperation) -> Outcome | None:
        """The outcome; None: it will be told later."""
        ...


class Steps(Protocol):
    """Those that operations take effect between."""

    def commit_all(self) -> None: ...


class LeaderControls:
    """`handlers` by type of message; `may_run` is what the loop must know."""

    def __init__(
        self,
        steps: Steps,
        recorder: StepRecorder,
        lockstep: Lockstep,
        queues: RequestQueues,
        planner: StepPlanner,
        committer: StepCommitter,
        pages: PageManager,
        endpoints: Endpoints,
        dp: DpRankInfo,
        operations: Operations | None,
    ) -> None:
        self._steps = steps
        self._recorder = recorder
        self._lockstep = lockstep
        self._queues = queues
        self._planner = planner
        self._committer = committer
        self._pages = pages
        self._endpoints = endpoints
        self._dp = dp
        self._operations = operations
        self._num_weight_updates = 0
        self._is_paused = False
        self._unanswered_pauses: list[str] = []
        self.handlers: dict[type, Callable[..., None]] = {AbortReq: self._on_abort, ControlReq: self._on_control}
        # What leaders do by themselves; anything else is for all ranks.
        self._own_operations: dict[type, Callable[..., None]] = {
            FlushCache: self._on_flush_cache,
            PauseGeneration: self._on_pause_generation,
            ContinueGeneration: self._on_continue_generation,
            UpdateWeightVersion: self._on_update_weight_version,
        }

    @property
    def blocked(self) -> Blocked | None:
        """Why nobody may generate; None if nothing stands against it."""
        return None if self._operations is None else self._operations.blocked

    @property
    def may_run(self) -> bool:
        """Whether steps may be planned."""
        return not self._is_paused and self.blocked is None

    def state(self) -> dict[str, int | float | str]:
        """What a question for the leader's state is told of this."""
        return {
            "weight_version": self._recorder.weight_version,
            "is_paused": int(self._is_paused),
            "is_blocked": int(self.blocked is not None),
            "blocked": "" if self.blocked is None else self.blocked.message,
            "num_weight_updates": self._num_weight_updates,
        }

    def _on_abort(self, message: AbortReq) -> None:
        """Abort in any state: what is in flight is committed first, so that only requests between steps are left."""
        if not message.rid and not message.abort_all:
            return
        prefix = "" if message.abort_all else message.rid
        if not self._queues.matching(prefix, exact=message.exact):
            return
        self._steps.commit_all()
        finished: list[ReqFinished] = []
        for req in self._queues.matching(prefix, exact=message.exact):
            req.finish_reason = FinishReason("abort", message=message.message)
            finished.append(self._committer.finish(req))
        self._recorder.record_idle(finished)

    def _on_control(self, message: ControlReq) -> None:
        handler = self._own_operations.get(type(message.operation), self._on_rank_operation)
        handler(message.op_id, message.operation)

    def _on_flush_cache(self, op_id: str, op: FlushCache) -> None:
        """All leaders decide alike, from what the agreement says of all; the first one answers. Requests that wait, as
        after a pause that took their pages, hold none."""
        num_running = self._lockstep.agreement.num_running
        if num_running == 0:
            self._empty_cache()
        text = f"not flushed: {num_running} requests run" if num_running else "cache flushed"
        self._reply(op_id, Outcome(num_running == 0, text))

    def _empty_cache(self) -> None:
        """Nobody runs, anywhere."""
        self._steps.commit_all()
        self._pages.flush()
        self._pages.check_integrity()
        self._recorder.note(CacheFlushed())
        self._recorder.record_idle([])

    def _reply(self, op_id: str, outcome: Outcome) -> None:
        """The first leader answers for all, who come to the same outcome."""
        if self._dp.dp_rank == 0:
            reply = ControlReply(
                op_id,
                outcome.success,
                outcome.message,
                blocked=self.blocked,
                payload=outcome.payload,
                weight_version=self._recorder.weight_version,
            )
            self._endpoints.frontend.send(reply)

    def _on_pause_generation(self, op_id: str, op: PauseGeneration) -> None:
        self._steps.commit_all()
        finished: list[ReqFinished] = []
        if op.mode != "in_place":
            for req in self._queues.matching(""):
                # What another engine reads cannot come again as it was.
                if op.mode == "abort" or (req.is_lent and req.is_running):
                    req.finish_reason = FinishReason("abort", message=ABORTED_BY_PAUSE)
                    finished.append(self._committer.finish(req))
        if op.mode == "retract":
            self._recorder.note_all(self._planner.retract_running())
        if finished or self._recorder.has_events:
            self._recorder.record_idle(finished)
        self._is_paused = True
        self._unanswered_pauses.append(op_id)

    def answer_pauses(self, agreement: Agreement) -> None:
        """After the first agreement of a pause, which says how many requests all leaders have kept."""
        for op_id in self._unanswered_pauses:
            self._reply(op_id, Outcome(True, f"paused: {agreement.num_reqs} requests are kept"))
        self._unanswered_pauses.clear()

    def _on_continue_generation(self, op_id: str, op: ContinueGeneration) -> None:
        blocked = self.blocked
        if blocked is None:
            self._is_paused = False
        self._reply(op_id, Outcome(blocked is None, "generation goes on" if blocked is None else blocked.message))

    def _on_update_weight_version(self, op_id: str, op: UpdateWeightVersion) -> None:
        """What was launched before ran under the old name."""
        self._steps.commit_all()
        self._recorder.weight_version = op.new_version
        self._reply(op_id, Outcome(True, f"the weights are called {op.new_version!r}"))

    def _on_rank_operation(self, op_id: str, op: ControlOperation) -> None:
        """Between two steps: what was launched before is committed under the weights that it ran with."""
        self._steps.commit_all()
        refusal = self._refusal_of(op)
        if refusal is not None:
            if isinstance(op, UpdateWeightsFromDistributed):
                # The trainer may have begun to send; see `GroupRegistry.discard`.
                left = self._run_on_all_ranks(op_id, DestroyWeightsUpdateGroup(op.group_name))
                if left is not None and left.success:
                    refusal += f"; group {op.group_name!r} is left, join it again"
            self._reply(op_id, Outcome(False, refusal))
            return
        outcome = self._run_on_all_ranks(op_id, op)
        if outcome is None:
            return
        if outcome.success and op.empties_cache:
            self._empty_cache()
        if outcome.weight_version is not None:
            self._recorder.weight_version = outcome.weight_version
            self._num_weight_updates += 1
        self._reply(op_id, outcome)

    def _run_on_all_ranks(self, op_id: str, op: ControlOperation) -> Outcome | None:
        assert self._operations is not None
        for peer in self._endpoints.peers:
            peer.send(PeerOperation(op_id, op))
        return self._operations.run(op_id, op)

    def _refusal_of(self, op: ControlOperation) -> str | None:
        """Why the operation cannot be done now, by what the agreement says of all leaders."""
        if isinstance(op, ReleaseMemoryOccupation) and self._lockstep.agreement.num_reqs:
            return (
                f"memory is released only when nothing runs or waits: {self._lockstep.agreement.num_reqs} requests do"
            )
        version = self._recorder.weight_version
        if isinstance(op, WeightUpdate) and op.base_version not in (None, version):
            return (
                f"base_version={op.base_version!r}: the weights here are {version!r}; send a full update; nothing was "
                "changed"
            )
        num_running = self._lockstep.agreement.num_running
        if op.empties_cache and num_running:
            return (
                f"flush_cache: must be false while requests run, {num_running} do; or pause with mode 'retract' or 'abort' "
                "first"
            )
        return None
