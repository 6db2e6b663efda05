"""Runs the simulation of one engine: warm-up, then each variant for a number of steps, each drained and checked."""

from __future__ import annotations

import gc
from cProfile import Profile
from dataclasses import dataclass

import zmq

from waybill.engine.text.token_decoder import TokenDecoder

from .before import ledger_as_before
from .leaders import Leaders
from .output import OutputSide
from .rule import Rule
from .tape import Tape
from .timeline import StepCost
from .workload import Conversations, Totals

COMPARE_ALL_UP_TO_DP = 8
SAMPLE = 16
# Steps after the begin of a variant that are not counted: the first turns arrive all at once.
SETTLING_STEPS = 20
# Steps between two changes of the ledger's code.
BLOCK = 10
CHUNK = 2048


@dataclass(frozen=True)
class Scale:
    """How large a simulation is: tokens of the longest context and of a rank's KV pool."""

    longest: int
    kv_tokens: int


FULL = Scale(longest=28672, kv_tokens=36864)
QUICK = Scale(longest=2048, kv_tokens=8192)


@dataclass(frozen=True)
class Run:
    """One variant at one size: its steps with the ledger as it is, and those with the ledger as it was."""

    dp_size: int
    variant: str
    steps: list[StepCost]
    before: list[StepCost]
    totals: Totals

    @property
    def finish_share(self) -> float:
        """Of the steps, those in which a request finished."""
        steps = self.steps + self.before
        return sum(step.num_finished > 0 for step in steps) / len(steps)


class SimulatedEngine:
    """`compare` alternates between the ledger as it is and as it was."""

    def __init__(self, dp_size: int, decoder: TokenDecoder | None, scale: Scale, *, compare: bool = True) -> None:
        self.dp_size = dp_size
        self._compare = compare
        self._scale = scale
        self._context = zmq.Context()
        rule = Rule()
        self.output = OutputSide(self._context, dp_size, decoder)
        self.leaders = Leaders(self._context, dp_size, rule, CHUNK, scale.kv_tokens)
        compare_every = 1 if dp_size <= COMPARE_ALL_UP_TO_DP else SAMPLE
        self.conversations = Conversations(self.leaders.link, dp_size, rule, compare_every, scale.longest, seed=dp_size)

    def record(self) -> Tape:
        """From now on everything that the leaders send is on a tape."""
        self.leaders.capture.tape = self.output.tape = Tape()
        return self.output.tape

    def warm_up(self) -> tuple[list[StepCost], list[StepCost]]:
        """Prefill on all ranks at once, until every pool is full and every context cached; the steps with the ledger as it
        is and as it was."""
        self.conversations.send_fillers(self._scale.kv_tokens)
        steps = self._until_rest()
        self.conversations.send_contexts()
        steps += self._until_rest()
        self._check()
        is_full = [step.num_rows >= self.dp_size * CHUNK // 2 for step in steps]
        return [s for s, full in zip(steps[::2], is_full[::2], strict=True) if full], [
            s for s, full in zip(steps[1::2], is_full[1::2], strict=True) if full
        ]

    def run(self, variant: str, num_steps: int, profile: Profile | None = None) -> Run:
        self.conversations.totals = Totals()
        self.conversations.begin(variant)
        for _ in range(SETTLING_STEPS):
            self._step()
        gc.collect()
        gc.freeze()
        # With all leaders in one process the collector would walk 128 times what it walks in one.
        gc.disable()
        self.output.profile = profile
        if self.output.tape is not None:
            self.output.tape.timed_from = len(self.output.tape.steps) - 1
            self.output.tape.timed_to = self.output.tape.timed_from + num_steps
        kinds = [self._compare and index // BLOCK % 2 == 1 for index in range(num_steps)]
        steps = [self._step(as_before=kind) for kind in kinds]
        self.output.profile = None
        gc.enable()
        self.conversations.drain()
        self._until_rest()
        self._check()
        return Run(
            self.dp_size,
            variant,
            [step for step, kind in zip(steps, kinds, strict=True) if not kind],
            [step for step, kind in zip(steps, kinds, strict=True) if kind],
            self.conversations.totals,
        )

    def close(self) -> None:
        self._context.destroy(linger=0)

    def _until_rest(self) -> list[StepCost]:
        steps: list[StepCost] = []
        while True:
            steps.append(self._step(as_before=self._compare and len(steps) % 2 == 1))
            if self.leaders.agreement.may_sleep:
                # An even number, so that those as before stay every second one.
                return steps if len(steps) % 2 == 0 else steps[:-1]

    def _step(self, *, as_before: bool = False) -> StepCost:
        processor, output_sender = self.output.processor, self.output.output_sender
        filed, shipped, link_s = processor.num_rows_filed, output_sender.num_bytes_shipped, self.conversations.link_s
        self.leaders.step()
        with ledger_as_before(as_before):
            records = self.output.work_off()
        if self.output.tape is not None:
            self.output.tape.turn()
        num_finished = self.output.deliver(self.conversations)
        return StepCost(
            host_s=self.leaders.host_s.copy(),
            records=records,
            num_rows=processor.num_rows_filed - filed,
            num_bytes_shipped=output_sender.num_bytes_shipped - shipped,
            num_finished=num_finished,
            link_s=self.conversations.link_s - link_s,
        )

    def _check(self) -> None:
        """
        Raises:
            AssertionError: something is missing, or was not given back.
        """
        assert self.conversations.num_open == 0, "requests without an answer"
        assert self.output.processor.num_rows_refused == 0
        self.leaders.check_at_rest()
