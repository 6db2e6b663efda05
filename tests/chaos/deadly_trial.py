"""A fault that a run may die of: then everybody is told, in time, and nothing is left; or it goes on, and rightly."""

from __future__ import annotations

import asyncio
import random
import time

import psutil
from support.serial_run import CHECKPOINT

from .callers import Callers
from .catalogue import SHORT
from .deck import Trial
from .outcome import Outcome
from .run_place import RunPlace, may_change_user, may_mount
from .service import HEARTBEAT_S, GoneError, RefusedError, Service
from .shared_services import make_service
from .strikes import STRIKES, Struck
from .witness import Judge, Witness

# Beyond the documented heartbeat: for a machine with two cores that runs all of it.
GRACE_S = 10.0
BOUND_S = HEARTBEAT_S + GRACE_S
# All processes are gone: torchrun gives ranks that do not heed SIGTERM some time before it kills.
END_BOUND_S = HEARTBEAT_S + 40.0
LEFTOVER_BOUND_S = 10.0
EXIT_BOUND_S = 45.0
POLL_S = 0.1
# Seconds between the moment's beginning and the fault, at most.
DELAYS_S = {
    "start-up": 4.0,
    "idle": 1.0,
    "prefill": 0.6,
    "decode": 1.0,
    "control": 0.6,
    "update": 0.15,
    "shutdown": 0.5,
}


class DeadlyTrial:
    """One run from its start to what it leaves behind."""

    def __init__(self, trial: Trial, judge: Judge) -> None:
        self._trial = trial
        self._judge = judge
        self._choose = trial.dice()
        self._outcome = Outcome(trial, bound_s=BOUND_S)
        self._struck = Struck("nothing", ends_run=False)
        self._struck_at = 0.0

    async def run(self) -> Outcome:
        began = time.monotonic()
        small_disk, unprivileged = self._trial.kind == "full disk", self._trial.kind == "thread limit"
        if (small_disk and not may_mount()) or (unprivileged and not may_change_user()):
            self._outcome.skipped = True
            self._outcome.what = "needs a user who may mount and start processes of others"
            return self._outcome
        place = RunPlace(small_disk=small_disk, unprivileged=unprivileged)
        try:
            service = make_service(self._trial.shape, place)
            try:
                await self._live(service)
            except (GoneError, RefusedError, TimeoutError) as error:
                self._outcome.faults.append(f"before any fault: {error!r}")
            left = await asyncio.to_thread(place.wait_until_empty, LEFTOVER_BOUND_S)
            self._outcome.faults += [f"left behind: {each}" for each in left]
            if self._outcome.faults:
                self._outcome.log = service.last_words()
        finally:
            place.clean_up()
        self._outcome.what = self._struck.what
        self._outcome.seconds = time.monotonic() - began
        return self._outcome

    async def _live(self, service: Service) -> None:
        starting = asyncio.create_task(service.wait_until_ready())
        callers = Callers(service, self._judge, self._choose)
        if self._trial.moment == "start-up":
            await self._strike_while_it_starts(service, starting)
        else:
            await starting
            await self._reach_moment(service, callers)
            await self._strike(service, self._role())
            if self._trial.moment != "shutdown":
                callers.start_late_ones()
            await callers.wait(self._struck_at + BOUND_S)
        has_ended = await self._settle(service)
        if not has_ended:
            self._tell_to_stop(service)
        await self._see_exit(service)
        # A caller that waited until the end has been judged; what ended it then does not count.
        callers.give_up()
        self._outcome.faults += callers.faults(self._struck_at, BOUND_S)
        self._outcome.wait_s = callers.worst_wait(self._struck_at)
        self._outcome.result = f"{'ended' if has_ended else 'went on'}, {callers.told()}"

    def _role(self) -> str:
        return self._choose.choice(self._trial.shape.roles)

    async def _strike_while_it_starts(self, service: Service, starting: asyncio.Task[None]) -> None:
        """Once the process is there. One that is stopped then is let go on: ranks that load have no bound of seconds."""
        role = self._role()
        while role not in service.place.processes() and not starting.done():
            await asyncio.sleep(POLL_S)
        await asyncio.sleep(self._choose.uniform(0.0, DELAYS_S["start-up"]))
        await self._strike(service, role)
        if self._trial.kind == "stop":
            await asyncio.sleep(self._choose.uniform(0.5, HEARTBEAT_S))
            self._struck.release()
            self._struck = Struck(self._struck.what + ", let go on", ends_run=False)
        await asyncio.wait([starting])
        if (error := starting.exception()) is not None and not isinstance(error, GoneError | RefusedError):
            self._outcome.faults.append(f"the start: {error!r}")

    async def _reach_moment(self, service: Service, callers: Callers) -> None:
        moment, choose = self._trial.moment, self._choose
        first = callers.start_mix(moment)
        await asyncio.wait_for(first.wait(), BOUND_S)
        if moment == "update":
            callers.control("update_weights_from_disk", model_path=str(CHECKPOINT), abort_all_requests=True)
        if moment == "shutdown":
            service.tell_to_stop()
        await asyncio.sleep(choose.uniform(0.0, DELAYS_S[moment]))

    async def _strike(self, service: Service, role: str) -> None:
        try:
            self._struck = STRIKES[self._trial.kind](service, self._choose, role)
        except psutil.NoSuchProcess:
            # It has ended before: at the end of a shutdown, say.
            self._struck = Struck(f"{role} was gone already", ends_run=False)
        self._struck_at = time.monotonic()
        if self._struck.what == "SIGSTOP to caller":
            # Who is stopped waits for nobody; the bound is for what it finds when it wakes up.
            await asyncio.sleep(HEARTBEAT_S + 2.0)
            self._struck.release()
            self._struck_at = time.monotonic()

    async def _settle(self, service: Service) -> bool:
        """Whether the run has ended; if not, a witness has been answered rightly after the fault was taken back."""
        must_end = self._struck.ends_run or self._trial.moment == "shutdown"
        if not self._struck.ends_run:
            self._struck.release()
        deadline = time.monotonic() + END_BOUND_S
        witness = Witness(service, self._judge, random.Random(self._trial.seed), SHORT)
        while time.monotonic() < deadline:
            if not self._living(service):
                return True
            if not must_end and await self._is_right(witness):
                return False
            await asyncio.sleep(POLL_S)
        living = ", ".join(self._living(service))
        self._outcome.faults += [f"has neither ended nor serves; {living} live", *witness.faults[-2:]]
        return False

    @staticmethod
    async def _is_right(witness: Witness) -> bool:
        witness.faults.clear()
        await witness.ask()
        await witness.ask()
        return not witness.faults

    def _living(self, service: Service) -> list[str]:
        """Processes of the run. A calling program survives its engine."""
        living = service.place.processes()
        if self._struck.what != "SIGKILL to caller":
            living.pop("caller", None)
        return sorted(living)

    def _tell_to_stop(self, service: Service) -> None:
        if self._trial.moment != "shutdown":
            service.tell_to_stop()

    async def _see_exit(self, service: Service) -> None:
        if service.shape.kind == "engine":
            # The end of its commands ends the program, whatever has become of its engine.
            service.tell_to_stop()
        try:
            await service.wait_for_exit(EXIT_BOUND_S)
        except TimeoutError:
            self._outcome.faults.append(f"the first process did not end within {EXIT_BOUND_S:.0f} s")


async def run_deadly(trial: Trial, judge: Judge) -> Outcome:
    return await DeadlyTrial(trial, judge).run()
