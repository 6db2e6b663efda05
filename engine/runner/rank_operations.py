"""What every rank of an engine does between two steps when it is told to: weights, update groups, device memory.

All ranks run the same operation at the same step and come to the same outcome; leaders act on it, rank 0 of the world
answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from ...parallel.mesh import ParallelMesh
from ..config import EngineConfig
from ..control.blocked import Blocked
from ..control.operations import (
    CheckWeights,
    ControlOperation,
    DestroyWeightsUpdateGroup,
    GetWeightsByName,
    InitWeightsUpdateGroup,
    ReleaseMemoryOccupation,
    ResumeMemoryOccupation,
    UpdateWeightsFromDisk,
    UpdateWeightsFromDistributed,
    UpdateWeightsFromTensor,
    WeightUpdate,
)
from ..weight_sync.group_registry import GroupRegistry
from ..weight_sync.inspection import first_rows, join_checksums, join_rows, piece_checksums
from ..weight_sync.receiver import WeightReceiver
from ..weight_sync.report import Outcome, RankReport, exchange_reports
from ..weight_sync.snapshot import WeightSnapshot
from .memory_occupation import MemoryOccupation, check_tags
from .model_runner import ModelRunner

# What is read back becomes JSON on the step thread.
MAX_VALUES_READ = 1 << 20


class RankOperations:
    """`answer_later(op_id, outcome)` is called from a thread, on rank 0 alone, for what takes its time."""

    def __init__(
        self,
        runner: ModelRunner,
        mesh: ParallelMesh,
        config: EngineConfig,
        answer_later: Callable[[str, Outcome], None],
    ) -> None:
        self._runner = runner
        self._mesh = mesh
        self._answer_later = answer_later
        self._started_at_random = config.load_format == "dummy"
        self._groups = GroupRegistry(mesh, config.weight_sync_timeout_s, config.weight_sync_groups)
        self._receiver = WeightReceiver(runner.model, mesh, self._groups)
        self._memory = MemoryOccupation(runner.model, runner.kv_store)
        self._snapshot = WeightSnapshot()
        self._actions: dict[type, Callable[..., Outcome]] = {
            UpdateWeightsFromDisk: self._update_weights,
            UpdateWeightsFromTensor: self._update_weights,
            UpdateWeightsFromDistributed: self._update_weights,
            DestroyWeightsUpdateGroup: self._destroy_group,
            GetWeightsByName: self._get_weights,
            CheckWeights: self._check_weights,
            ReleaseMemoryOccupation: self._release,
            ResumeMemoryOccupation: self._resume,
        }

    def run(self, op_id: str, op: ControlOperation) -> Outcome | None:
        """The outcome, the same on every rank; None: it will be told later. A `ValueError` of an action is a refusal, which
        all ranks come to alike."""
        try:
            if isinstance(op, InitWeightsUpdateGroup):
                self._init_group(op_id, op)
                return None
            return self._actions[type(op)](op)
        except ValueError as error:
            return Outcome(False, str(error))

    @property
    def blocked(self) -> Blocked | None:
        """Why nobody may generate; None if nothing stands against it."""
        return self._memory.blocked or self._receiver.progress.blocked

    @property
    def _memory_message(self) -> str:
        assert self._memory.blocked is not None
        return self._memory.blocked.message

    def _update_weights(self, op: WeightUpdate) -> Outcome:
        if "weights" in self._memory.released:
            return Outcome(False, self._memory_message + self._receiver.leave_group(op))
        return self._receiver.update_weights(op)

    def _agreed(self, check: Callable[[], object]) -> None:
        """What a rank knows of groups depends on threads: all refuse where one does.

        Raises:
            ValueError: `check` raised one, on some rank.
        """
        error = None
        try:
            check()
        except ValueError as refusal:
            error = str(refusal)
        verdict = exchange_reports(RankReport(error), self._mesh.world)
        if verdict.error is not None:
            raise ValueError(verdict.error)

    def _init_group(self, op_id: str, op: InitWeightsUpdateGroup) -> None:
        self._agreed(lambda: self._groups.check(op))

        def done(error: str | None) -> None:
            if self._mesh.world.rank == 0:
                self._answer_later(op_id, Outcome(error is None, error or f"group {op.group_name!r} is joined"))

        self._groups.join(op, done)

    def _destroy_group(self, op: DestroyWeightsUpdateGroup) -> Outcome:
        """Left where it was joined: after a join that failed on some ranks the others must not keep it."""
        was_joined = self._groups.discard(op.group_name)
        verdict = exchange_reports(RankReport(has_changed=was_joined), self._mesh.world)
        if not verdict.any_changed:
            raise ValueError(f"group_name: {op.group_name!r} was not joined")
        return Outcome(True, f"group {op.group_name!r} is left")

    def _get_weights(self, op: GetWeightsByName) -> Outcome:
        self._check_weights_are_there()
        weight = self._receiver.known.get(op.name)
        if weight is None:
            raise ValueError(f"name: the model has no {op.name!r}")
        num_values = min(op.truncate_size, weight.shape[0]) * math.prod(weight.shape[1:])
        if num_values > MAX_VALUES_READ:
            raise ValueError(
                f"truncate_size={op.truncate_size}: {num_values} values, must be at most {MAX_VALUES_READ}"
            )
        verdict = exchange_reports(RankReport(payload=first_rows(weight, op.truncate_size)), self._mesh.world)
        rows = join_rows([report.payload for report in verdict.reports], weight.shape, op.truncate_size)
        return Outcome(True, payload=msgspec.json.encode(rows.tolist()))

    def _check_weights(self, op: CheckWeights) -> Outcome:
        self._check_weights_are_there()
        if self._started_at_random and not self._receiver.num_updates:
            raise ValueError("weights: they are random (load_format='dummy'); there are checksums after an update")
        weights = self._receiver.weights
        verdict = exchange_reports(RankReport(payload=piece_checksums(weights)), self._mesh.world)
        checksums = join_checksums([report.payload for report in verdict.reports], weights)
        return self._snapshot.check(op, checksums)

    def _check_weights_are_there(self) -> None:
        if "weights" in self._memory.released:
            raise ValueError(self._memory_message)

    def _release(self, op: ReleaseMemoryOccupation) -> Outcome:
        check_tags(op.owners)
        if not op.owners:
            return Outcome(True, "released nothing: CUDA graphs go with weights or kv_cache")
        self._runner.drop_graphs()
        self._memory.release(op.owners)
        return Outcome(True, f"released {', '.join(op.owners)}")

    def _resume(self, op: ResumeMemoryOccupation) -> Outcome:
        check_tags(op.owners)
        resumed = self._memory.resume(op.owners)
        if "weights" in resumed:
            self._receiver.void()
        if resumed and not self._memory.released:
            self._runner.make_graphs()
        needs = "; requests wait until an update has brought every weight" if "weights" in resumed else ""
        return Outcome(True, f"resumed {', '.join(sorted(resumed)) or 'nothing: it was not released'}{needs}")
