"""What the campaign of faults would say of a service that is wrong, slow, or leaves something behind."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from chaos import hostile_frames
from chaos import witness as witness_module
from chaos.callers import Callers
from chaos.deck import DECK_SIZE, MOMENTS, deal, draw, kinds
from chaos.harmless_trial import FAULTS
from chaos.hostile_frames import claim_frames
from chaos.run_place import MARK, RunPlace
from chaos.scene import Scene
from chaos.service import Answer, GoneError, RefusedError, Shape
from chaos.strikes import STRIKES
from chaos.witness import Judge, Witness
from support.serial_run import Question, SerialAnswer, SerialRun

QUESTION = Question([1, 2, 3], 4)
ROWS = np.arange(6 * 2, dtype=np.uint8).reshape(6, 1, 2)
RIGHT = Answer([5, 6, 7, 8], ROWS, {"type": "length", "length": 4})


class Reference:
    """Finds no near-tie."""

    def beyond(self, *arguments: Any) -> str:
        return "not a near-tie"


class FakeService:
    """Answers what it is given, late."""

    shape = Shape("server", 1, True)

    def __init__(self, answer: Answer | Exception, after_s: float = 0.0) -> None:
        self._answer = answer
        self._after_s = after_s

    async def generate(self, request: dict[str, Any]) -> Answer:
        await asyncio.sleep(self._after_s)
        if isinstance(self._answer, Exception):
            raise self._answer
        start = request["routed_experts_start_len"]
        rows = self._answer.rows
        return Answer(self._answer.output, None if rows is None else rows[start:], self._answer.finish_reason)

    async def stream(self, request: dict[str, Any], **options: Any) -> Answer:
        return await self.generate(request)

    async def info(self) -> dict[str, Any]:
        return {}


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Judge:
    serial = SerialRun([QUESTION], [SerialAnswer(RIGHT.output, ROWS)])
    monkeypatch.setattr(serial, "beyond_near_ties", Reference().beyond)
    return Judge(serial)


def faults_of(judge: Judge, answer: Answer | Exception, tolerates: str = "") -> list[str]:
    witness = Witness(FakeService(answer), judge, random.Random(0), range(1))
    witness.tolerates = {tolerates}
    for _ in range(4):
        asyncio.run(witness.ask())
    return witness.faults


def test_the_serial_answer_is_right_and_so_is_its_beginning_where_aborts_are_expected(judge: Judge) -> None:
    assert faults_of(judge, RIGHT) == []
    cut = Answer([5, 6], ROWS[:4], {"type": "abort"})
    assert faults_of(judge, cut, "abort") == []
    assert faults_of(judge, cut)


@pytest.mark.parametrize(
    "answer",
    [
        Answer([5, 6, 7, 9], ROWS, RIGHT.finish_reason),
        Answer(RIGHT.output, np.flip(ROWS, axis=2), RIGHT.finish_reason),
        Answer(RIGHT.output, ROWS[:-1], RIGHT.finish_reason),
        Answer(RIGHT.output, None, RIGHT.finish_reason),
        Answer(RIGHT.output[:3], ROWS[:5], RIGHT.finish_reason),
        RefusedError(503, "no"),
        GoneError("no"),
    ],
    ids=["token", "row", "a row less", "no rows", "a token less", "refused", "gone"],
)
def test_anything_else_is_a_fault(judge: Judge, answer: Answer | Exception) -> None:
    assert len(faults_of(judge, answer)) == 4


def test_a_wait_is_a_fault(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(witness_module, "WITNESS_BOUND_S", 0.02)
    witness = Witness(FakeService(RIGHT, after_s=0.04), judge, random.Random(0), range(1))
    asyncio.run(witness.ask())
    assert "waited" in witness.faults[0] and witness.worst_s > 0.02
    hanging = Witness(FakeService(RIGHT, after_s=60.0), judge, random.Random(0), range(1))
    asyncio.run(hanging.ask())
    assert "had no answer" in hanging.faults[0]


def test_judging_an_answer_is_no_wait(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference, which an answer that differs needs, takes seconds to load where the processor is busy."""
    monkeypatch.setattr(witness_module, "WITNESS_BOUND_S", 0.1)
    monkeypatch.setattr(judge, "fault", lambda *_, **__: time.sleep(0.2))
    witness = Witness(FakeService(RIGHT), judge, random.Random(0), range(1))
    asyncio.run(witness.ask())
    assert witness.faults == [] and witness.worst_s < 0.1


def test_nor_is_it_one_of_the_callers_whom_a_fault_meets(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    async def call() -> list[str]:
        callers = Callers(FakeService(RIGHT), judge, random.Random(0))
        struck_at = time.monotonic()
        callers.whole(0)
        await callers.wait(struck_at + 5.0)
        return callers.faults(struck_at, bound_s=0.1)

    monkeypatch.setattr(judge, "fault", lambda *_, **__: time.sleep(0.2))
    assert asyncio.run(call()) == []


@pytest.mark.parametrize("busy", ["malformed", "send"])
def test_what_sends_frames_does_not_keep_the_witness_waiting(
    judge: Judge, monkeypatch: pytest.MonkeyPatch, busy: str
) -> None:
    def take_long(*_: Any) -> list[bytes]:
        time.sleep(0.02)
        return [b""]

    async def longest_turn() -> float:
        service = FakeService(RIGHT)
        witness = Witness(service, judge, random.Random(0), range(1))
        sending = asyncio.create_task(claim_frames(Scene(service, random.Random(0), judge, witness, 0)))
        longest = 0.0
        while not sending.done():
            began = time.monotonic()
            await asyncio.sleep(0)
            longest = max(longest, time.monotonic() - began)
        assert "sockets" in sending.result()
        return longest

    monkeypatch.setattr(hostile_frames, busy, take_long)
    monkeypatch.setattr(hostile_frames, "send_raw", take_long)
    monkeypatch.setattr(FakeService, "info", address_of_claims)
    assert asyncio.run(longest_turn()) < 0.2


async def address_of_claims(_: FakeService) -> dict[str, Any]:
    return {"routed_experts_endpoint": "inproc://claims"}


def test_a_caller_that_waits_beyond_the_bound_is_a_fault(judge: Judge) -> None:
    async def call(service: FakeService) -> list[str]:
        callers = Callers(service, judge, random.Random(0))
        struck_at = time.monotonic()
        callers.whole(0)
        await callers.wait(struck_at + 0.1)
        callers.give_up()
        return callers.faults(struck_at, bound_s=0.05)

    assert asyncio.run(call(FakeService(GoneError("told at once")))) == []
    (fault,) = asyncio.run(call(FakeService(RIGHT, after_s=60.0)))
    assert "still waits" in fault


def test_what_a_run_leaves_is_found_and_ended() -> None:
    place = RunPlace()
    try:
        assert place.leftovers() == []
        assert place.environment[MARK]
        command = [sys.executable, "-c", "import time; time.sleep(60)"]
        child = subprocess.Popen(command, env=place.environment, start_new_session=True)
        (place.folder / "torchelastic_x").mkdir()
        (process, folder) = place.wait_until_empty(0.0)
        assert str(child.pid) in process and folder == "$TMPDIR/torchelastic_x"
    finally:
        place.clean_up()
    assert child.wait(10.0) != 0 and not place.folder.exists()
    assert os.environ.get(MARK) is None


def test_a_seed_is_one_trial_and_a_deck_has_every_kind() -> None:
    trials = [draw(seed) for seed in range(2 * DECK_SIZE)]
    assert trials == [draw(seed) for seed in range(2 * DECK_SIZE)]
    assert {trial.kind for trial in trials} == set(kinds()) == {*FAULTS, *STRIKES}
    assert all(trial.is_deadly == (trial.kind in STRIKES) for trial in trials)
    many = [draw(seed) for seed in range(200)]
    assert {trial.moment for trial in many if trial.kind == "kill"} == set(MOMENTS)
    assert {str(trial.shape) for trial in many} > {"server, tp 2", "engine, dp 2, no routing"}
    assert deal(7, "kill").dice().random() == deal(7, "kill").dice().random()
