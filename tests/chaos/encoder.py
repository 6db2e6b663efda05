"""Faults between an engine and its encoder: whichever dies, is stopped or is cut off, callers have an error or the right
answer, in time, those without images notice nothing of the encoder's end, and what comes next is right.

A server and an encoder on one host. In each trial some callers ask with images, most of which are new to both, when it
happens; answers that come are compared with a serial run's, tokens and rows. Who has died is started anew, the other one
goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from typing import Any

import psutil
from support.encoder_process import SECRET, VARIABLE, EncoderProcess
from support.engine_pair import free_port

from .http_service import HttpService
from .image_questions import TEXTS, WITH_IMAGES, ImageQuestion, ImagesSerialRun
from .kept import Result
from .run_place import RunPlace
from .scene_trials import judge_answer
from .service import GoneError, RefusedError, Shape
from .sides import EXIT_BOUND_S, LEFTOVER_BOUND_S, rest_of, shut
from .witness import Judge, request_for

KINDS = {
    "kill-encoder": 5,
    "kill-stopped-encoder": 4,
    "stop-encoder": 3,
    "long-stop-encoder": 2,
    "cut-encoder": 4,
    "kill-engine": 2,
    "leave": 2,
    "restart-encoder": 3,
}
# What callers may not notice.
HARMLESS = ("leave", "stop-encoder")
# Callers with images, and one without.
NUM_CALLERS = 5
ENCODER_TIMEOUT_S = 12.0
GRACE_S = 15.0
# One that is silent for 10 s is taken for dead; an image may take as long as it may.
BOUND_S = max(10.0, ENCODER_TIMEOUT_S) + GRACE_S
# A new encoder is found by the next ping.
FOUND_BOUND_S = 20.0
MAX_MORE_FDS = 24
IMAGE_MEMORY_BYTES = 4 << 20
IMAGE_MEMORY = "memfd:waybill-image"
SHAPE = Shape("server", 1, routing=True)


class Encoder:
    """From its start to what it leaves behind."""

    def __init__(self, checkpoint: str, port: int) -> None:
        self._checkpoint = checkpoint
        self.port = port
        self.place = RunPlace()
        self._process: EncoderProcess | None = None

    async def start(self) -> None:
        self.place.clean_up()
        self.place = RunPlace()
        self._process = EncoderProcess(self._checkpoint, self.port, environment=self.place.environment)
        await asyncio.to_thread(self._process.wait_until_ready)

    @property
    def process(self) -> psutil.Process:
        assert self._process is not None
        return psutil.Process(self._process.pid)

    def kill(self) -> None:
        self.process.kill()

    async def end(self) -> list[str]:
        """What is left of it once it was killed."""
        assert self._process is not None
        self._process.close()
        left = await asyncio.to_thread(self.place.wait_until_empty, LEFTOVER_BOUND_S)
        self.place.clean_up()
        return [f"encoder: left behind: {each}" for each in left]

    def clean_up(self) -> None:
        if self._process is not None:
            self._process.close()
        self.place.clean_up()


class EncoderScene:
    """See `Scene`."""

    def __init__(self, judge: Judge, checkpoint: str) -> None:
        self._judge = judge
        self._options = ["--model", checkpoint, "--num-threads", "1", "--encoder-timeout", str(ENCODER_TIMEOUT_S)]
        self._options += ["--image-memory-bytes", str(IMAGE_MEMORY_BYTES)]
        self.encoder = Encoder(checkpoint, free_port())
        self._place = RunPlace()
        self._engine: HttpService | None = None
        self._num_fds: dict[str, int] = {}

    @property
    def engine(self) -> HttpService:
        assert self._engine is not None
        return self._engine

    async def start(self) -> None:
        await self.encoder.start()
        await self._start_engine()

    async def _start_engine(self) -> None:
        self._place.clean_up()
        self._place = RunPlace()
        options = [*self._options, "--encoder", f"127.0.0.1:{self.encoder.port}"]
        self._engine = HttpService(SHAPE, self._place, options, {VARIABLE: SECRET, "OMP_NUM_THREADS": "1"})
        await self._engine.wait_until_ready()

    async def stop(self) -> list[str]:
        self.engine.tell_to_stop()
        faults = await self._end_engine()
        self.encoder.kill()
        return faults + await self.encoder.end()

    async def _end_engine(self) -> list[str]:
        self._num_fds.clear()
        try:
            await self.engine.wait_for_exit(EXIT_BOUND_S)
            left = await asyncio.to_thread(self._place.wait_until_empty, LEFTOVER_BOUND_S)
            return [f"engine: left behind: {each}" for each in left]
        except TimeoutError:
            return [f"engine: has not ended within {EXIT_BOUND_S:g} s"]
        finally:
            self._place.clean_up()

    def clean_up(self) -> None:
        self.encoder.clean_up()
        self._place.clean_up()

    # --- a trial ----------------------------------------------------------------------------------------------------

    async def run(self, seed: int, kind: str) -> Result:
        result = Result("encoder", seed, kind, "images", BOUND_S)
        choose, began, near_ties = random.Random(seed), time.monotonic(), self._judge.num_by_near_ties
        callers = [asyncio.create_task(self._call(result, choose, *HARMLESS)) for _ in range(NUM_CALLERS - 1)]
        # It waits for no image, so it has an answer while the encoder is away.
        harmless = (*HARMLESS, kind) if kind != "kill-engine" else ()
        texts = [asyncio.create_task(self._call(result, choose, *harmless, questions=TEXTS))]
        await asyncio.sleep(choose.random() * 0.3)
        await self._strike(result, choose, callers)
        texts.append(asyncio.create_task(self._call(result, choose, *harmless, questions=TEXTS)))
        await asyncio.gather(*callers, *texts, return_exceptions=True)
        await self._recover(result, choose)
        result.num_by_near_ties = self._judge.num_by_near_ties - near_ties
        result.seconds = time.monotonic() - began
        return result

    async def _call(
        self, result: Result, choose: random.Random, *harmless: str, questions: range = WITH_IMAGES
    ) -> None:
        # More than one after the other: some that are encoded when it happens, and some that come later.
        for _ in range(choose.randint(1, 3)):
            index = choose.choice(questions)
            request = self._request(index, choose)
            ask = self.engine.stream if choose.random() < 0.4 else self.engine.generate
            await judge_answer(result, self._judge, index, request, ask(request), harmless)

    def _request(self, index: int, choose: random.Random) -> dict[str, Any]:
        question = self._judge.serial.catalogue[index]
        assert isinstance(question, ImageQuestion)
        images = {"image_data": question.image_data(choose)} if question.images else {}
        return request_for(self._judge.serial, index, self.engine, choose, **images)

    async def _strike(self, result: Result, choose: random.Random, callers: list[asyncio.Task[None]]) -> None:
        kind = result.kind
        if kind == "leave":
            # While their images wait.
            self.encoder.process.suspend()
            await asyncio.sleep(0.5)
            gone = choose.sample(callers, choose.randint(1, len(callers)))
            for caller in gone:
                caller.cancel()
            self.encoder.process.resume()
            result.what = f"{len(gone)} of {len(callers)} callers leave"
        elif kind == "cut-encoder":
            self.encoder.process.suspend()
            await asyncio.sleep(choose.uniform(0.1, 0.5))
            num_cut = self._cut()
            self.encoder.process.resume()
            result.what = f"{num_cut} connections shut"
        elif kind == "kill-engine":
            role = choose.choice(("rank 0", "frontend", "output processor", "agent"))
            self._place.process(role).kill()
            result.what = f"SIGKILL to the engine's {role}"
        elif kind in ("stop-encoder", "long-stop-encoder"):
            seconds = choose.uniform(11.0, 14.0) if kind.startswith("long") else choose.uniform(0.3, 3.0)
            self.encoder.process.suspend()
            await asyncio.sleep(seconds)
            self.encoder.process.resume()
            result.what = f"stopped for {seconds:.1f} s"
        else:
            await self._kill_encoder(result, choose)

    async def _kill_encoder(self, result: Result, choose: random.Random) -> None:
        if result.kind == "kill-stopped-encoder":
            self.encoder.process.suspend()
            await asyncio.sleep(choose.uniform(0.3, 1.0))
        self.encoder.kill()
        result.faults += await self.encoder.end()
        result.what = "SIGKILL"
        if result.kind == "restart-encoder":
            await self.encoder.start()
            result.what += ", and another one at once"

    def _cut(self) -> int:
        frontend, num_cut = self._place.process("frontend"), 0
        for connection in frontend.net_connections("tcp"):
            if connection.raddr and connection.raddr.port == self.encoder.port:
                shut(frontend.pid, connection.fd)
                num_cut += 1
        return num_cut

    # --- afterwards -------------------------------------------------------------------------------------------------

    async def _recover(self, result: Result, choose: random.Random) -> None:
        if result.kind == "kill-engine":
            result.faults += await self._end_engine()
            await self._start_engine()
        elif result.kind in ("kill-encoder", "kill-stopped-encoder"):
            await self.encoder.start()
        until = time.monotonic() + FOUND_BOUND_S
        while (problem := (await self.engine.info())["encoder_problem"]) and time.monotonic() < until:
            await asyncio.sleep(0.2)
        if problem:
            result.faults.append(f"afterwards: {problem}")
        # Also with an image that nobody knows.
        for index in (choose.choice(WITH_IMAGES), choose.choice(TEXTS)):
            request = self._request(index, choose)
            try:
                answer = await asyncio.wait_for(self.engine.generate(request), BOUND_S)
            except (GoneError, RefusedError, TimeoutError) as error:
                result.faults.append(f"afterwards: {error!r}")
                continue
            fault = self._judge.fault(index, request, answer)
            result.faults += [] if fault is None else [f"afterwards: {fault}"]
        with contextlib.suppress(GoneError, RefusedError):
            result.faults += await rest_of("engine", self.engine, "num_images_encoding")
            used = (await self.engine.info())["image_memory_used_bytes"]
            if used > IMAGE_MEMORY_BYTES:
                result.faults.append(f"engine: {used} bytes of images")
        result.faults += self._more_than_before()

    def _more_than_before(self) -> list[str]:
        faults = []
        for role in ("rank 0", "frontend"):
            try:
                num_fds = num_fds_without_images(self._place.process(role).pid)
            except psutil.NoSuchProcess:
                return [f"engine: has ended by itself: {self.engine.last_words()[-500:]}"]
            first = self._num_fds.setdefault(role, num_fds)
            if num_fds > first + MAX_MORE_FDS:
                faults.append(f"engine: {role} has {num_fds} descriptors, {first} at first")
        return faults


def num_fds_without_images(pid: int) -> int:
    """Those of images that are kept are bounded by their bytes."""
    num_fds = 0
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            num_fds += IMAGE_MEMORY not in os.readlink(entry.path)
    return num_fds


class EncoderScenes:
    """See `Scenes`."""

    name = "encoder"
    kinds = KINDS

    def __init__(self, judge: Judge) -> None:
        assert isinstance(judge.serial, ImagesSerialRun)
        self._judge = judge
        self._checkpoint = str(judge.serial.checkpoint)

    def transport_of(self, seed: int) -> str:
        return "images"

    def make(self, transport: str) -> EncoderScene:
        return EncoderScene(self._judge, self._checkpoint)
