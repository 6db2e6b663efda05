"""`/health_generate` over an engine that answers as the test likes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from waybill.engine.entrypoints.engine_health import EngineHealth
from waybill.engine.frontend.admission import OverloadedError
from waybill.engine.frontend.engine_connection import EngineDeadError
from waybill.engine.ipc.frontend_messages import ControlReply

# Long enough for a busy machine to get to what ends the check, short where the check must run into it.
LONG_S, SHORT_S = 60.0, 0.3
LENGTH: dict[str, Any] = {"type": "length", "length": 1}


@dataclass
class FakeManager:
    """States by dp rank; `moves` says whether a rank makes a step between two questions."""

    dp_size: int = 1
    num_running: int = 0
    num_waiting: int = 0
    moves: bool = False
    is_paused: bool = False
    is_blocked: bool = False
    answers: bool = True
    reasons: list[Any] = field(default_factory=lambda: [LENGTH])
    refusal: str | None = None
    outputs: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(num_outputs=0))
    num_questions: int = 0
    asked_ranks: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.config = SimpleNamespace(dp_size=self.dp_size)
        self.controls = SimpleNamespace(is_under_way=False)
        self.queries = SimpleNamespace(get_leader_states=self._get_leader_states)

    async def _get_leader_states(self) -> list[ControlReply]:
        self.num_questions += 1
        if not self.answers:
            await asyncio.Event().wait()
        state = {
            "num_steps": self.num_questions if self.moves else 7,
            "num_running": self.num_running,
            "num_waiting": self.num_waiting,
            "is_paused": int(self.is_paused),
            "is_blocked": int(self.is_blocked),
        }
        return [ControlReply("", True, state=state)] * self.dp_size

    async def generate(self, request: Any, **form: str) -> AsyncIterator[dict[str, Any]]:
        self.asked_ranks.append(request.routed_dp_rank)
        reason = self.reasons.pop(0) if len(self.reasons) > 1 else self.reasons[0]
        if isinstance(reason, Exception):
            raise reason
        if reason is None:
            await asyncio.Event().wait()
        yield {"meta_info": {"finish_reason": reason}}


def problem_of(manager: FakeManager, timeout_s: float = LONG_S) -> str | None:
    return asyncio.run(EngineHealth(manager, timeout_s).problem())  # type: ignore[arg-type]


def test_an_idle_engine_makes_a_token_on_every_dp_rank() -> None:
    manager = FakeManager(dp_size=3)
    assert problem_of(manager) is None
    assert manager.asked_ranks == [0, 1, 2]


def test_a_busy_engine_is_asked_for_no_token() -> None:
    """However many wait: a step is what counts."""
    manager = FakeManager(num_running=64, num_waiting=1000, moves=True)
    assert problem_of(manager) is None
    assert manager.asked_ranks == []


@pytest.mark.parametrize("dp_size", [1, 2])
@pytest.mark.parametrize("stuck", [{"num_running": 1}, {"num_waiting": 1}, {"answers": False}, {"reasons": [None]}])
def test_an_engine_that_is_stuck_is_found_within_the_bound(stuck: dict[str, Any], dp_size: int) -> None:
    assert problem_of(FakeManager(dp_size=dp_size, **stuck), SHORT_S) == "no step within 0.3 s"


@pytest.mark.parametrize("held", ["is_paused", "is_blocked"])
def test_an_engine_that_makes_no_steps_on_purpose_is_well(held: str) -> None:
    manager = FakeManager(num_waiting=5, **{held: True})
    assert problem_of(manager) is None
    assert manager.asked_ranks == []


def test_an_engine_that_refuses_requests_says_why() -> None:
    assert problem_of(FakeManager(refusal="memory is released")) == "memory is released"


@pytest.mark.parametrize("answers", [True, False])
def test_a_control_operation_has_a_bound_of_its_own(answers: bool) -> None:
    manager = FakeManager(num_waiting=1, answers=answers)
    manager.controls.is_under_way = True
    assert problem_of(manager, LONG_S if answers else SHORT_S) is None


def test_a_token_that_fails_is_told() -> None:
    failed = {"type": "abort", "message": "logits are not finite", "status_code": 500}
    assert problem_of(FakeManager(dp_size=2, reasons=[LENGTH, failed])) == "logits are not finite"


@pytest.mark.parametrize("ended", [{"type": "abort", "message": "aborted by request"}, OverloadedError("full")])
def test_a_token_that_somebody_ended_is_asked_for_again(ended: object) -> None:
    manager = FakeManager(reasons=[ended, LENGTH])
    assert problem_of(manager) is None
    assert manager.asked_ranks == [0, 0]


def test_a_dead_engine_is_an_error() -> None:
    with pytest.raises(EngineDeadError):
        problem_of(FakeManager(reasons=[EngineDeadError("gone")]))


def test_others_that_come_first_do_not_make_a_token_wait() -> None:
    """The engine was idle, then its queue filled up before the token; its steps are proof enough."""
    manager = FakeManager(reasons=[None])

    async def run() -> str | None:
        check = asyncio.create_task(EngineHealth(manager, LONG_S).problem())  # type: ignore[arg-type]
        while not manager.asked_ranks:
            await asyncio.sleep(0)
        manager.num_waiting, manager.moves = 1000, True
        manager.num_questions = 100
        return await check

    assert asyncio.run(run()) is None


def test_tokens_since_the_last_check_count_and_nobody_is_asked() -> None:
    manager = FakeManager(num_running=1, moves=True)

    async def run() -> list[int]:
        health = EngineHealth(manager, LONG_S)  # type: ignore[arg-type]
        asked = []
        for _ in range(3):
            assert await health.problem() is None
            asked.append(manager.num_questions)
            manager.outputs.num_outputs += 1
        return asked

    first, second, third = asyncio.run(run())
    assert first == second == third


def test_a_step_since_the_last_check_counts() -> None:
    manager = FakeManager(num_running=1, moves=True)

    async def run() -> int:
        health = EngineHealth(manager, LONG_S)  # type: ignore[arg-type]
        assert await health.problem() is None
        before = manager.num_questions
        assert await health.problem() is None
        return manager.num_questions - before

    assert asyncio.run(run()) == 1


def test_many_callers_share_one_check() -> None:
    manager = FakeManager()

    async def run() -> list[str | None]:
        health = EngineHealth(manager, LONG_S)  # type: ignore[arg-type]
        return await asyncio.gather(*(health.problem() for _ in range(500)))

    assert asyncio.run(run()) == [None] * 500
    assert manager.asked_ranks == [0] and manager.num_questions == 1
