"""A program with an `Engine` as a child, and what it is told to ask."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from support.serial_run import CHECKPOINT

from .http_service import answer_of
from .run_place import RunPlace
from .service import HEARTBEAT_S, START_BOUND_S, WEIGHT_SYNC_S, Answer, GoneError, RefusedError, Shape

TESTS = Path(__file__).parents[1]
LOG_BYTES = 2000


class EngineService:
    """See `Service`."""

    def __init__(self, shape: Shape, place: RunPlace) -> None:
        self.shape = shape
        self.place = place
        options = {
            **{"model_path": str(CHECKPOINT), "tp_size": shape.tp, "dp_size": shape.dp, "dtype": "float32"},
            **{"kv_cache_tokens": 8192, "chunked_prefill_size": 64, "enable_return_routed_experts": shape.routing},
            **{"heartbeat_timeout_s": HEARTBEAT_S, "weight_sync_timeout_s": WEIGHT_SYNC_S},
        }
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._program = subprocess.Popen(
            [*place.prefix, sys.executable, "-m", "chaos.engine_program", json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=place.environment | {"PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,
        )
        self._numbers = itertools.count()
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[str, asyncio.Future[dict[str, Any]]] = {"ready": self._loop.create_future()}
        self._first: dict[str, asyncio.Event] = {}
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._program.stdout is not None
        for line in self._program.stdout:
            self._loop.call_soon_threadsafe(self._hear, json.loads(line))
        self._loop.call_soon_threadsafe(self._hear_no_more)

    def _hear(self, message: dict[str, Any]) -> None:
        if "first" in message:
            self._first.get(message["id"], asyncio.Event()).set()
        elif (waiting := self._waiting.pop(message["id"], None)) is not None and not waiting.done():
            waiting.set_result(message)

    def _hear_no_more(self) -> None:
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_result({"gone": "the program ended"})
        self._waiting.clear()

    async def wait_until_ready(self) -> None:
        self._result(await asyncio.wait_for(asyncio.shield(self._waiting["ready"]), START_BOUND_S))

    async def generate(self, request: dict[str, Any]) -> Answer:
        return answer_of(await self._ask("generate", request=request))

    async def stream(
        self, request: dict[str, Any], *, first: asyncio.Event | None = None, leave_after: int | None = None
    ) -> Answer:
        return answer_of(await self._ask("stream", first=first, request=request, leave_after=leave_after))

    async def control(self, name: str, **arguments: Any) -> None:
        await self._ask("call", method=name, arguments=arguments)

    async def info(self) -> dict[str, Any]:
        return await self._ask("call", method="get_server_info", arguments={})

    async def abort(self, rid: str) -> None:
        await self._ask("call", method="abort_request", arguments={"rid": rid})

    async def _ask(self, what: str, *, first: asyncio.Event | None = None, **fields: Any) -> Any:
        number = str(next(self._numbers))
        waiting = self._waiting[number] = self._loop.create_future()
        self._first[number] = first or asyncio.Event()
        assert self._program.stdin is not None
        try:
            self._program.stdin.write(json.dumps({"id": number, "do": what, **fields}) + "\n")
            self._program.stdin.flush()
        except OSError:
            raise GoneError("the program ended") from None
        try:
            return self._result(await waiting)
        finally:
            self._waiting.pop(number, None)
            del self._first[number]

    @staticmethod
    def _result(message: dict[str, Any]) -> Any:
        if "gone" in message:
            raise GoneError(message["gone"])
        if "refused" in message:
            raise RefusedError(400 if message["is_users"] else 500, message["refused"])
        return message.get("result")

    def tell_to_stop(self) -> None:
        assert self._program.stdin is not None
        # What the pipe still holds is for nobody where the program is gone.
        with contextlib.suppress(OSError):
            self._program.stdin.close()

    async def wait_for_exit(self, timeout_s: float) -> int:
        try:
            return await asyncio.to_thread(self._program.wait, timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError from None

    def last_words(self) -> str:
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - LOG_BYTES))
        return self._log.read().decode(errors="replace")
