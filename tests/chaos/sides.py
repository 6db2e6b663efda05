"""An engine for prompts and one for what follows, each a server that may be killed and started anew, asked as a router
asks them."""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import os
import secrets
import socket
import time
from pathlib import Path
from typing import Any

import psutil
from support.engine_pair import HOST, free_port

from waybill.launch.node_options import RUN_SECRET_VARIABLE

from .http_service import HttpService
from .run_place import RunPlace
from .service import Answer, GoneError, RefusedError, Shape

SHAPE = Shape("server", 2, routing=True)
TRANSFER_TIMEOUT_S = 12.0
REST_BOUND_S = 40.0
EXIT_BOUND_S = 60.0
LEFTOVER_BOUND_S = 10.0
POOL = "memfd:waybill-kv-pool"
SYS_PIDFD_GETFD = 438


async def rest_of(name: str, service: HttpService, *more: str) -> list[str]:
    """What is wrong with a server that is asked for nothing: every page must be free or cached. `more` is what must come
    to nothing beside requests."""
    names = ("num_running", "num_waiting", "num_transferring", *more)
    until, state = time.monotonic() + REST_BOUND_S, {}
    while time.monotonic() < until:
        state = await service.info()
        if not any(state[each] for each in names):
            if state["num_free_pages"] + state["num_cached_pages"] == state["num_pages"]:
                return []
            return [f"{name}: pages are lost: {state['num_free_pages']} free, {state['num_cached_pages']} cached"]
        await asyncio.sleep(0.1)
    return [f"{name}: does not come to rest: { ({each: state.get(each) for each in names}) }"]


class Side:
    """One of the two, from its start to what it leaves behind."""

    def __init__(self, name: str, options: list[str], secret: str) -> None:
        self.name = name
        self._options = ["--dp", "1", "--tp", "1", "--num-threads", "1", "--disaggregation", name, *options]
        self._options += ["--disaggregation-timeout", str(TRANSFER_TIMEOUT_S)]
        self._environment = {RUN_SECRET_VARIABLE: secret, "OMP_NUM_THREADS": "1"}
        self.place = RunPlace()
        self.service: HttpService | None = None

    async def start(self) -> None:
        self.place.clean_up()
        self.place = RunPlace()
        self.service = HttpService(SHAPE, self.place, self._options, self._environment)
        await self.service.wait_until_ready()

    @property
    def running(self) -> HttpService:
        assert self.service is not None
        return self.service

    def rank(self) -> psutil.Process:
        return self.place.process("rank 0")

    async def has_ended(self) -> bool:
        """Whether it is gone, or going: then its end is waited for."""
        try:
            await asyncio.wait_for(self.running.info(), REST_BOUND_S)
        except (GoneError, RefusedError, TimeoutError):
            return True
        return False

    async def end(self) -> list[str]:
        """What is left of it, once it has ended by itself."""
        try:
            await self.running.wait_for_exit(EXIT_BOUND_S)
            left = await asyncio.to_thread(self.place.wait_until_empty, LEFTOVER_BOUND_S)
            return [f"{self.name}: left behind: {each}" for each in left]
        except TimeoutError:
            return [f"{self.name}: has not ended within {EXIT_BOUND_S:g} s"]
        finally:
            self.place.clean_up()

    async def stop(self) -> list[str]:
        self.running.tell_to_stop()
        return await self.end()

    async def rest(self) -> list[str]:
        """What is wrong with it when nothing is asked of it."""
        return await rest_of(self.name, self.running)

    def mapped_pools(self) -> set[str]:
        """Shared pools in the rank's address space, by inode."""
        lines = Path(f"/proc/{self.rank().pid}/maps").read_text().splitlines()
        return {line.split()[4] for line in lines if POOL in line}


class Sides:
    def __init__(self, transport: str) -> None:
        secret, self.port = secrets.token_hex(32), free_port()
        both = ["--disaggregation-transport", transport]
        self.prefill = Side("prefill", [*both, "--disaggregation-bootstrap-port", str(self.port)], secret)
        self.decode = Side("decode", both, secret)
        self._rooms = itertools.count(1)

    @property
    def all(self) -> tuple[Side, Side]:
        return self.prefill, self.decode

    async def start(self) -> None:
        await asyncio.gather(*(side.start() for side in self.all))

    async def ask(self, request: dict[str, Any], *, streams: bool = False) -> Answer:
        """The decode's side's answer, when both have answered; the prefill's where that is an error and comes first."""
        place = {"bootstrap_host": HOST, "bootstrap_port": self.port, "bootstrap_room": next(self._rooms)}
        body = {**request, **place}
        decode = self.decode.running.stream(body) if streams else self.decode.running.generate(body)
        tasks = [asyncio.create_task(self.prefill.running.generate(body)), asyncio.create_task(decode)]
        try:
            await asyncio.wait(tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return tasks[1].result()

    def cut(self) -> int:
        """Shut all TCP connections between the two; returns how many."""
        ports = {
            connection.laddr.port
            for process in self.prefill.place.processes().values()
            for connection in process.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        }
        num_cut = 0
        for role in ("rank 0", "output processor"):
            process = self.decode.place.process(role)
            for connection in process.net_connections("tcp"):
                if connection.raddr and connection.raddr.port in ports:
                    shut(process.pid, connection.fd)
                    num_cut += 1
        return num_cut


def shut(pid: int, fd: int) -> None:
    """Another process's connection, as if its host had gone."""
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(pid)
    try:
        own = libc.syscall(SYS_PIDFD_GETFD, pidfd, fd, 0)
        if own < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
        with socket.socket(fileno=own) as connection:
            connection.shutdown(socket.SHUT_RDWR)
    finally:
        os.close(pidfd)
