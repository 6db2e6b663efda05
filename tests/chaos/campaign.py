"""Runs trials: those beside a witness first, service by service, then those that may end their run."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

from .catalogue import SHORT
from .deadly_trial import run_deadly
from .deck import Trial
from .harmless_trial import run_harmless
from .outcome import Outcome
from .service import GoneError, RefusedError, Shape
from .shared_services import SharedService
from .witness import Judge, Witness

# Requests before a service's memory and descriptors are taken as its usual ones.
NUM_WARM_UP = 12


class Campaign:
    """`tell` is given every outcome as it is known. No trial begins after `deadline`, a time of the monotonic clock."""

    def __init__(self, judge: Judge, tell: Callable[[Outcome], None], deadline: float) -> None:
        self._judge = judge
        self._tell = tell
        self._deadline = deadline
        self.outcomes: list[Outcome] = []
        # What was wrong with a shared service as a whole.
        self.faults: list[str] = []
        # Resident bytes that a process of a shared service has more at the end, by service.
        self.growth: dict[Shape, dict[str, int]] = {}

    async def run(self, trials: Sequence[Trial]) -> None:
        harmless = [trial for trial in trials if not trial.is_deadly]
        for shape in dict.fromkeys(trial.shape for trial in harmless):
            await self._run_on(shape, [trial for trial in harmless if trial.shape == shape])
        for trial in trials:
            if trial.is_deadly and self._has_time():
                self._note(await run_deadly(trial, self._judge))
        if len(self.outcomes) < len(trials):
            self.faults.append(f"{len(trials) - len(self.outcomes)} trials were not begun")

    def _has_time(self) -> bool:
        return time.monotonic() < self._deadline

    async def _run_on(self, shape: Shape, trials: Sequence[Trial]) -> None:
        """One service for all of them; a new one where it has not survived."""
        shared: SharedService | None = None
        try:
            for trial in trials:
                if not self._has_time():
                    return
                shared = shared or await self._start(shape)
                if shared is None:
                    return
                outcome = await run_harmless(trial, shared, self._judge)
                self._note(outcome)
                self._keep_growth(shape, shared)
                if outcome.faults:
                    await shared.stop()
                    shared = None
        finally:
            if shared is not None:
                self.faults += [f"{shape}: {fault}" for fault in await shared.stop()]

    async def _start(self, shape: Shape) -> SharedService | None:
        try:
            shared = await SharedService.start(shape)
        except (GoneError, RefusedError, TimeoutError) as error:
            self.faults.append(f"{shape} did not start: {error}")
            return None
        witness = Witness(shared.service, self._judge, random.Random(str(shape)), SHORT)
        for _ in range(NUM_WARM_UP):
            await witness.ask()
        self.faults += [f"{shape}, new: {fault}" for fault in witness.faults]
        shared.measure()
        return shared

    def _keep_growth(self, shape: Shape, shared: SharedService) -> None:
        of_shape = self.growth.setdefault(shape, {})
        for role, growth in shared.growth.items():
            of_shape[role] = max(growth, of_shape.get(role, 0))

    def _note(self, outcome: Outcome) -> None:
        outcome.num_answers = self._judge.num_right + self._judge.num_by_near_ties
        outcome.num_near_ties = self._judge.num_by_near_ties
        self._judge.num_right = self._judge.num_by_near_ties = 0
        self.outcomes.append(outcome)
        self._tell(outcome)
