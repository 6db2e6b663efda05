"""An ordinary client beside the faults: what it asks is answered, in time, with the serial run's tokens and rows."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

from support.serial_run import SerialRun, greedy

from .service import Answer, GoneError, RefusedError, Service

# A plain request, whatever else the service is asked meanwhile, on a busy machine. Longer is a stall.
WITNESS_BOUND_S = 10.0
PAUSE_S = 0.02
MAX_FAULTS = 3


def request_for(
    serial: SerialRun, index: int, service: Service, choose: random.Random, **fields: Any
) -> dict[str, Any]:
    """The catalogue's question as a request; with routes from a random position on, where there are any."""
    question = serial.catalogue[index]
    request: dict[str, Any] = {"input_ids": question.prompt, "sampling_params": greedy(question), **fields}
    if service.shape.routing:
        start = choose.choice((0, choose.randint(0, len(question.prompt))))
        request |= {"return_routed_experts": True, "routed_experts_start_len": start}
        request["routed_experts_format"] = "compact"
    if service.shape.dp > 1 and choose.random() < 0.5:
        request["routed_dp_rank"] = choose.randrange(service.shape.dp)
    return request


class Judge:
    """Says what is wrong with answers."""

    def __init__(self, serial: SerialRun) -> None:
        self.serial = serial
        self.num_right = 0
        self.num_by_near_ties = 0

    def fault(self, index: int, request: dict[str, Any], answer: Answer, *, whole: bool = True) -> str | None:
        """None for the serial run's answer, or, where it need not be `whole`, its beginning."""
        question = self.serial.catalogue[index]
        start = request.get("routed_experts_start_len", 0)
        if whole and (len(answer.output) != question.num_new or answer.finish_reason["type"] != "length"):
            return f"question {index}: {len(answer.output)} tokens of {question.num_new}, {answer.finish_reason}"
        if answer.rows is None and request.get("return_routed_experts") and whole:
            return f"question {index}: no rows"
        rows = answer.rows
        if rows is not None and whole and len(rows) != len(question.prompt) + question.num_new - 1 - start:
            return f"question {index}: {len(rows)} rows from {start} on"
        if self.serial.is_same(index, answer.output, rows, start):
            self.num_right += 1
            return None
        if rows is None:
            return f"question {index}: other tokens, and no rows to explain them by"
        self.num_by_near_ties += 1
        return self.serial.beyond_near_ties(index, answer.output, rows, start)


class Witness:
    """Asks one question after the other. `tolerates` says what else than a whole answer may come: "abort", "refusal"."""

    def __init__(self, service: Service, judge: Judge, choose: random.Random, questions: range) -> None:
        self._service = service
        self._judge = judge
        self._choose = choose
        self._questions = questions
        self.tolerates: set[str] = set()
        # Longer than usual where the service is told to wait.
        self.allowance_s = 0.0
        self.stop = asyncio.Event()
        self.num_asked = 0
        self.worst_s = 0.0
        self.faults: list[str] = []

    async def run(self) -> None:
        """Until `stop` is set; the last question is waited for."""
        while not self.stop.is_set() and len(self.faults) < MAX_FAULTS:
            await self.ask()
            await asyncio.sleep(PAUSE_S)

    async def ask(self) -> None:
        choose = self._choose
        index = choose.choice(self._questions)
        request = request_for(self._judge.serial, index, self._service, choose)
        ask = self._service.stream if choose.random() < 0.3 else self._service.generate
        began = time.monotonic()
        bound = WITNESS_BOUND_S + self.allowance_s
        self.num_asked += 1
        answer = None
        try:
            answer = await asyncio.wait_for(ask(request), 3 * bound)
        except RefusedError as error:
            if "refusal" not in self.tolerates or error.status not in (400, 503):
                self.faults.append(f"the witness was refused: {error}")
        except GoneError as error:
            self.faults.append(f"the witness lost the service: {error}")
        except TimeoutError:
            self.faults.append(f"the witness had no answer within {3 * bound:.0f} s")
        waited = time.monotonic() - began
        self.worst_s = max(self.worst_s, waited)
        if waited > bound:
            self.faults.append(f"the witness waited {waited:.1f} s")
        if answer is not None:
            fault = self._judge.fault(index, request, answer, whole="abort" not in self.tolerates)
            if fault is not None:
                self.faults.append(fault)
