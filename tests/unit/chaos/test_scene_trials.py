"""Trials of scenes: what callers may see, and that a campaign goes on where it was ended."""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chaos.disaggregation import KINDS, SidesScenes
from chaos.encoder import KINDS as ENCODER_KINDS
from chaos.kept import Kept, Result
from chaos.scene_trials import SERVICE_TRIALS, campaign, judge_answer, kind_of, trials_of
from chaos.service import Answer, GoneError, RefusedError
from chaos.witness import Judge
from support.serial_run import Question, SerialAnswer, SerialRun

QUESTION = Question([1, 2, 3], 4)
ROWS = np.arange(6 * 2, dtype=np.uint8).reshape(6, 1, 2)
RIGHT = Answer([5, 6, 7, 8], ROWS, {"type": "length", "length": 4})
REQUEST = {"return_routed_experts": True}


class FakeScenes:
    """Says what was tried; ends like a program that is interrupted after so many trials."""

    name = "fake"
    kinds = {"kill": 1, "cut": 2}  # noqa: RUF012

    def __init__(self, most: int = 1000) -> None:
        self.most = most
        self.tried: list[int] = []
        self.num_started = self.num_cleaned = 0

    def transport_of(self, seed: int) -> str:
        return "tcp"

    def make(self, transport: str) -> FakeScenes:
        return self

    async def start(self) -> None:
        self.num_started += 1

    async def run(self, seed: int, kind: str) -> Result:
        if len(self.tried) == self.most:
            raise KeyboardInterrupt
        self.tried.append(seed)
        return Result("fake", seed, kind, "tcp", 10.0)

    async def stop(self) -> list[str]:
        return ["a folder"] if 25 in self.tried else []

    def clean_up(self) -> None:
        self.num_cleaned += 1


def options(**changed: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"seed": None, "only": None, "first": 0, "trials": 26, "minutes": 1.0, **changed})


def test_a_campaign_goes_on_where_it_was_ended(tmp_path: Path) -> None:
    path = tmp_path / "results"
    first, second = FakeScenes(most=13), FakeScenes()
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(campaign(options(), first, Kept(path)))
    assert first.num_started == first.num_cleaned == 2
    asyncio.run(campaign(options(), second, Kept(path)))
    assert first.tried + second.tried == list(range(26))
    kept = Kept(path).results("fake")
    assert [result.seed for result in kept] == list(range(26)) and Kept(path).seeds("sides") == set()
    # What is found at the end is the last trial's of that service.
    assert [result.seed for result in kept if result.faults] == [25]


@pytest.mark.parametrize("kinds", [KINDS, ENCODER_KINDS])
def test_each_kind_comes_as_often_as_it_is_said(kinds: dict[str, int]) -> None:
    size = sum(kinds.values())
    assert Counter(kind_of(seed, kinds) for seed in range(size, 2 * size)) == kinds
    only = trials_of(options(only="leave", trials=size), kinds, ())
    assert len(only) == kinds["leave"]
    assert trials_of(options(seed=[3, 7], only="leave"), kinds, {3}) == [(7, "leave")]


def test_half_of_the_trials_go_over_tcp() -> None:
    serial = SerialRun([QUESTION], [SerialAnswer(RIGHT.output, ROWS)])
    shown = Counter(SidesScenes(Judge(serial), "both").transport_of(seed) for seed in range(10 * SERVICE_TRIALS))
    assert shown["tcp"] == shown["shared"] == 5 * SERVICE_TRIALS


def judged(answer: Answer | Exception, kind: str = "kill", after_s: float = 0.0, bound_s: float = 10.0) -> Result:
    result = Result("fake", 0, kind, "tcp", bound_s)
    judge = Judge(SerialRun([QUESTION], [SerialAnswer(RIGHT.output, ROWS)]))

    async def ask() -> Answer:
        await asyncio.sleep(after_s)
        if isinstance(answer, Exception):
            raise answer
        return answer

    asyncio.run(judge_answer(result, judge, 0, REQUEST, ask(), ("leave",)))
    return result


def test_what_callers_may_see() -> None:
    assert judged(RIGHT).num_right == 1 and not judged(RIGHT).faults
    for error in (GoneError("it has ended"), RefusedError(503, "down")):
        assert judged(error).num_errors == 1 and not judged(error).faults
        assert judged(error, kind="leave").faults
    without_rows = Answer(RIGHT.output, None, RIGHT.finish_reason)
    assert judged(without_rows).faults == ["question 0: no rows"] and judged(without_rows).num_right == 0
    assert judged(RIGHT, after_s=0.1, bound_s=0.05).faults == ["waited 0.1 s"]
    assert "no answer at all" in judged(RIGHT, after_s=5.0, bound_s=0.05).faults
