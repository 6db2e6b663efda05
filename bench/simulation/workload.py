"""Conversations of many turns, and what their answers must be.

Every rank has one long context that its conversations begin with, as the samples of one prompt do; a turn adds a user's
tokens and an answer, and the next turn sends everything. Answers have exponential lengths, so finishes come at a steady
rate: with a mean of 195 tokens and 32 x 8 requests a request finishes somewhere in 73 % of the steps.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from waybill.engine.frontend.leader_link import LeaderLink
from waybill.engine.io_struct import OutputOptions, RequestOutput, SamplingParams
from waybill.engine.ipc.frontend_messages import AbortReq, TokenizedGenerateReqInput
from waybill.engine.routing.wire import decode

from .rule import VOCAB, Rule

REQUESTS_PER_RANK = 8
MEAN_ANSWER_TOKENS = 195
USER_TOKENS = (20, 200)
SHORTEST_CONTEXT, LONGEST_CONTEXT = 1024, 28672
MAX_HISTORY = 32768
# Of the pool, left when it is filled.
SPARE_TOKENS = 64
GOLDEN = 0.6180339887498949
VARIANTS = ("delta", "full", "stream")


@dataclass
class Turn:
    """A request that was sent: rank and prompt, and what has come back of it."""

    dp_rank: int
    prompt: np.ndarray
    start_len: int
    output_ids: list[int]


@dataclass
class Totals:
    """What arrived."""

    num_answers: int = 0
    num_rows: int = 0
    num_bytes: int = 0
    num_rows_compared: int = 0


class Conversations:
    """The frontend's and the callers' part. `variant`: rows from the turn's start, full histories, or streamed text."""

    def __init__(self, link: LeaderLink, dp_size: int, rule: Rule, compare_every: int, longest: int, seed: int) -> None:
        self._link = link
        self._dp_size = dp_size
        self._rule = rule
        self._compare_every = compare_every
        self._rng = np.random.default_rng(seed)
        self._contexts = [self._context(rank, longest) for rank in range(dp_size)]
        self._turns: dict[str, Turn] = {}
        self._num_turns = 0
        self.variant = VARIANTS[0]
        # No next turn follows an answer: so it is before the first one, too.
        self.is_draining = True
        self.totals = Totals()
        # CPU time of sending: a request goes to one leader, its number to all others.
        self.link_s = 0.0

    def _context(self, dp_rank: int, longest: int) -> np.ndarray:
        """Lengths are spread evenly over the ranks, whatever their number."""
        shortest = min(SHORTEST_CONTEXT, longest)
        length = shortest + int((longest - shortest) * ((dp_rank + 1) * GOLDEN % 1.0))
        return self._rng.integers(0, VOCAB, length, dtype=np.int32)

    @property
    def num_open(self) -> int:
        return len(self._turns)

    def send_fillers(self, kv_tokens: int) -> None:
        """One request a rank that fills what its context leaves of the pool: from then on pages are used again, as in an
        engine that has run for a while."""
        for rank in range(self._dp_size):
            length = kv_tokens - len(self._contexts[rank]) - SPARE_TOKENS
            self._send(rank, self._rng.integers(0, VOCAB, length, dtype=np.int32), 0, max_new_tokens=1)

    def send_contexts(self) -> None:
        """One request a rank whose prompt is the context: from then on it is cached."""
        for rank in range(self._dp_size):
            self._send(rank, self._contexts[rank], 0, max_new_tokens=1)

    def begin(self, variant: str) -> None:
        self.variant, self.is_draining = variant, False
        for rank in range(self._dp_size):
            for _ in range(REQUESTS_PER_RANK):
                self._next_turn(rank, self._contexts[rank])

    def drain(self) -> None:
        """No more turns; what runs is aborted, on all ranks at once."""
        self.is_draining = True
        self._link.send_to_all(lambda number: AbortReq(number, abort_all=True))

    def _next_turn(self, dp_rank: int, history: np.ndarray) -> None:
        num_user = int(self._rng.integers(*USER_TOKENS))
        num_answer = 1 + int(self._rng.exponential(MEAN_ANSWER_TOKENS - 1))
        if len(history) + num_user + num_answer > MAX_HISTORY:
            history = self._contexts[dp_rank]
            num_answer = min(num_answer, MAX_HISTORY - len(history) - num_user)
        user = self._rng.integers(0, VOCAB, num_user, dtype=np.int32)
        start_len = 0 if self.variant == "full" else len(history) - 1
        self._send(dp_rank, np.concatenate([history, user]), start_len, num_answer)

    def _send(self, dp_rank: int, prompt: np.ndarray, start_len: int, max_new_tokens: int) -> None:
        rid = f"{self.variant}-{dp_rank}-{self._num_turns}"
        self._num_turns += 1
        self._turns[rid] = Turn(dp_rank, prompt, start_len, [])
        params = SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True)
        options = OutputOptions(
            stream=self.variant == "stream", return_routed_experts=True, routed_experts_start_len=start_len
        )
        began = time.thread_time()
        self._link.send(
            dp_rank,
            lambda number: TokenizedGenerateReqInput(
                number,
                rid,
                prompt.tobytes(),
                params,
                options,
            ),
        )
        self.link_s += time.thread_time() - began

    def take(self, output: RequestOutput, frame: memoryview | None) -> None:
        """An output has arrived; when it is the last one of its turn, check it and send the next turn.

        Raises:
            AssertionError: it is not what the rule says.
        """
        turn = self._turns[output.rid]
        turn.output_ids += output.token_ids
        if output.finish_reason is None:
            return
        del self._turns[output.rid]
        assert output.routed_experts_error is None, output.routed_experts_error
        assert frame is not None
        is_aborted = output.finish_reason.type == "abort"
        self._check(output, turn, frame, is_aborted)
        if not self.is_draining:
            self._next_turn(turn.dp_rank, np.concatenate([turn.prompt, np.array(turn.output_ids, dtype=np.int32)]))

    def _check(self, output: RequestOutput, turn: Turn, frame: memoryview, is_aborted: bool) -> None:
        meta = output.routed_experts
        assert meta is not None
        rows = decode(meta, frame).rows
        first = len(turn.prompt)
        expected_ids = [self._rule.next_token(output.rid, first + i) for i in range(len(turn.output_ids))]
        assert turn.output_ids == expected_ids, "tokens of another request"
        tokens = np.concatenate([turn.prompt, np.array(expected_ids, dtype=np.int32)])
        if not is_aborted:
            assert (meta.start, meta.rows) == (turn.start_len, len(tokens) - 1 - turn.start_len), "rows are missing"
        if self.totals.num_answers % self._compare_every == 0:
            expected = self._rule.rows(turn.dp_rank, tokens[meta.start : meta.start + meta.rows], meta.start)
            assert np.array_equal(rows, expected), f"{output.rid}: rows differ from the rule"
            self.totals.num_rows_compared += meta.rows
        self.totals.num_answers += 1
        self.totals.num_rows += meta.rows
        self.totals.num_bytes += rows.nbytes
