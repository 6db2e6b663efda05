"""Services that many trials use one after the other, and what must be the same after each of them."""

from __future__ import annotations

import asyncio
import signal
import time
from dataclasses import dataclass, field
from typing import Any

import psutil

from .engine_service import EngineService
from .http_service import HttpService
from .run_place import RunPlace
from .service import GoneError, RefusedError, Service, Shape

# A server is told to stop by SIGTERM, and says so in the shell's way.
GOOD_STATUS = {"server": 128 + signal.SIGTERM, "engine": 0}
IDLE_BOUND_S = 20.0
EXIT_BOUND_S = 40.0
SETTLE_S = 10.0
# Connections that clients of the campaign keep open, a claim's socket and the like.
MAX_MORE_FDS = 16
# Of a process over all trials. An allocator keeps some of what a body of 64 MiB took.
MAX_GROWTH_BYTES = 400 << 20
MIB = 1 << 20


def make_service(shape: Shape, place: RunPlace) -> Service:
    return HttpService(shape, place) if shape.kind == "server" else EngineService(shape, place)


@dataclass
class SharedService:
    """A running service with what its processes held when it was new."""

    service: Service
    fds: dict[str, int] = field(default_factory=dict)
    rss: dict[str, int] = field(default_factory=dict)
    growth: dict[str, int] = field(default_factory=dict)

    @staticmethod
    async def start(shape: Shape) -> SharedService:
        place = RunPlace()
        try:
            service = make_service(shape, place)
            await service.wait_until_ready()
        except (GoneError, RefusedError, TimeoutError):
            place.clean_up()
            raise
        return SharedService(service)

    def measure(self) -> None:
        """After some first requests."""
        processes = self.service.place.processes()
        self.fds = {role: process.num_fds() for role, process in processes.items()}
        self.rss = {role: process.memory_info().rss for role, process in processes.items()}

    async def faults(self) -> list[str]:
        """What is not as it was, once nothing runs any more."""
        try:
            return [*await self._unfinished(), *await self._grown()]
        except (GoneError, RefusedError, TimeoutError) as error:
            return [f"the service does not tell its state: {error!r}"]
        except psutil.NoSuchProcess as error:
            return [f"ended meanwhile: {error}"]

    async def _unfinished(self) -> list[str]:
        deadline = time.monotonic() + IDLE_BOUND_S
        while (info := await asyncio.wait_for(self.service.info(), IDLE_BOUND_S))["num_running"] + info["num_waiting"]:
            if time.monotonic() > deadline:
                return [f"{info['num_running']} requests run and {info['num_waiting']} wait at the end"]
            await asyncio.sleep(0.05)
        found = [self._lost_pages(each) for each in info["dp_ranks"]]
        if info["routed_experts_refused"]:
            found.append(f"{info['routed_experts_refused']} answers had rows missing")
        return [fault for fault in found if fault]

    @staticmethod
    def _lost_pages(state: dict[str, Any]) -> str | None:
        lost = state["num_pages"] - state["num_free_pages"] - state["num_cached_pages"]
        return f"{lost} pages are lost" if lost else None

    async def _grown(self) -> list[str]:
        deadline = time.monotonic() + SETTLE_S
        while (found := self._too_much()) and time.monotonic() < deadline:
            await asyncio.sleep(0.2)
        return found

    def _too_much(self) -> list[str]:
        processes = self.service.place.processes()
        if missing := sorted(set(self.fds) - set(processes)):
            return [f"has ended: {', '.join(missing)}"]
        found = []
        for role in self.fds:
            process = processes[role]
            more = process.num_fds() - self.fds[role]
            if more > MAX_MORE_FDS:
                found.append(f"{role} has {more} file descriptors more than at the start")
            growth = self.growth[role] = process.memory_info().rss - self.rss[role]
            if growth > MAX_GROWTH_BYTES:
                found.append(f"{role} has grown by {growth / MIB:.0f} MiB")
        return found

    async def stop(self) -> list[str]:
        """As its operator does; what is left then."""
        place = self.service.place
        try:
            self.service.tell_to_stop()
            status = await self.service.wait_for_exit(EXIT_BOUND_S)
            found = [] if status == GOOD_STATUS[self.service.shape.kind] else [f"exit status {status}"]
            return found + [
                f"left behind: {left}" for left in await asyncio.to_thread(place.wait_until_empty, SETTLE_S)
            ]
        except TimeoutError:
            return [f"did not end within {EXIT_BOUND_S:.0f} s"]
        except psutil.NoSuchProcess:
            return []
        finally:
            place.clean_up()
