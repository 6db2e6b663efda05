"""The campaign of faults in small: beside a witness on one server, and a run that dies. `make chaos` is the whole."""

from __future__ import annotations

import argparse
import asyncio

import pytest
from chaos.catalogue import make_questions
from chaos.deadly_trial import run_deadly
from chaos.deck import Trial
from chaos.disaggregation import SidesScenes, serial_run
from chaos.harmless_trial import run_harmless
from chaos.kept import Kept
from chaos.outcome import Outcome
from chaos.scene_trials import campaign as campaign_of
from chaos.service import Shape
from chaos.shared_services import SharedService
from chaos.witness import Judge
from support.serial_run import SerialAnswer, SerialRun, greedy

KINDS = ("fuzzed bodies", "claim frames")
SHAPE = Shape("server", 1, True)


async def asked_one_at_a_time(shared: SharedService) -> SerialRun:
    """The serial run, by the service itself before anything is done to it."""
    questions = make_questions(num_decoded=100, num_prefilled=200)
    answers = []
    for question in questions:
        request = {"input_ids": question.prompt, "sampling_params": greedy(question), "return_routed_experts": True}
        answer = await shared.service.generate({**request, "routed_experts_format": "compact"})
        assert answer.rows is not None
        answers.append(SerialAnswer(answer.output, answer.rows))
    return SerialRun(questions, answers)


async def trials_beside_a_witness(shared: SharedService) -> tuple[Judge, list[Outcome]]:
    judge = Judge(await asked_one_at_a_time(shared))
    shared.measure()
    outcomes = [await run_harmless(Trial(seed, kind, SHAPE), shared, judge) for seed, kind in enumerate(KINDS)]
    assert judge.num_right > 2 * len(KINDS)
    return judge, outcomes


async def campaign(*, with_a_death: bool) -> list[str]:
    shared = await SharedService.start(SHAPE)
    try:
        judge, outcomes = await trials_beside_a_witness(shared)
    finally:
        found = await shared.stop()
    if with_a_death:
        outcomes.append(await run_deadly(Trial(1, "kill", Shape("engine", 2, True), "decode"), judge))
        assert outcomes[-1].result.startswith("ended") and "0 errors" not in outcomes[-1].result
    return found + [f"{outcome.line()}: {fault}" for outcome in outcomes for fault in outcome.faults]


# What is left of a run that dies is looked for in `test_death.py`, too.
@pytest.mark.parametrize("with_a_death", [False, pytest.param(True, marks=pytest.mark.matrix)])
def test_a_witness_does_not_notice_the_faults_of_others(with_a_death: bool) -> None:
    assert asyncio.run(campaign(with_a_death=with_a_death)) == []


@pytest.mark.matrix
def test_faults_between_two_sides() -> None:
    """`make chaos-disaggregation` is the whole."""
    options = argparse.Namespace(seed=None, only=None, first=2, trials=4, minutes=10.0)
    results = asyncio.run(campaign_of(options, SidesScenes(Judge(serial_run()), "shared"), Kept(None)))
    assert [result.kind for result in results] == ["cut", "cut", "kill-prefill", "leave"]
    assert [f"{result.line()}: {fault}" for result in results for fault in result.faults] == []
