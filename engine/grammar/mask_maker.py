"""Masks of allowed tokens, made off the step thread: one job a step for all requests of it, whose matchers the library
moves on threads of its own, without the interpreter's lock."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer

from .constraint import Constraint, Mask
from .limits import brief, parser_limits
from .token_trie import load_token_trie

logger = logging.getLogger(__name__)

# Grammars that stay compiled.
MAX_COMPILED = 64
NUM_COMPILING = 2
MAX_MASK_THREADS = 8
# A mask takes less than a tenth of a second, see `limits.py`; whoever waits longer has a machine without time.
MASK_TIMEOUT_S = 60.0


class MaskMaker:
    """Compiles grammars and makes masks, for one leader. Its tokenizer is read when the first grammar comes."""

    def __init__(
        self, tokenizer_path: str, vocab_size: int, eos_token_ids: Sequence[int], num_threads: int = MAX_MASK_THREADS
    ) -> None:
        self._tokenizer_path = tokenizer_path
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._compiling = ThreadPoolExecutor(NUM_COMPILING, "grammars")
        self._masking = ThreadPoolExecutor(1, "masks")
        self._executor = LLExecutor(max(1, num_threads))
        self._compiled: OrderedDict[str, Future[LLMatcher]] = OrderedDict()
        self._trie: LLTokenizer | None = None
        self._trie_lock = Lock()

    # --- compiling --------------------------------------------------------------------------------------------------

    def start(self, grammar: str, begins_after: int | None) -> Constraint:
        """Have a grammar compiled, if it is not, and the first mask made; returns at once."""
        compiled = self._compiled.get(grammar)
        if compiled is None:
            compiled = self._compiled[grammar] = self._compiling.submit(self._compile, grammar)
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        constraint = Constraint(compiled, begins_after)
        pending: Future[None] = Future()
        constraint.pending = pending
        # Runs on a compiling thread, or here where the grammar is there.
        compiled.add_done_callback(lambda _: self._begin(constraint, pending))
        return constraint

    def _compile(self, grammar: str) -> LLMatcher:
        with self._trie_lock:
            if self._trie is None:
                self._trie = load_token_trie(self._tokenizer_path, self._vocab_size, self._eos_token_ids)
        matcher = LLMatcher(self._trie, grammar, limits=parser_limits(), log_level=0)
        if matcher.is_error():
            raise ValueError(brief(matcher.get_error()))
        return matcher

    def _begin(self, constraint: Constraint, pending: Future[None]) -> None:
        """The first mask, in turn with those of others."""

        def work() -> None:
            error = constraint.compiled.exception()
            if error is not None:
                self._fail(constraint, f"the grammar cannot be compiled: {error}")
                return
            constraint.matcher = constraint.compiled.result().deep_copy()
            if constraint.has_begun:
                self._fill([constraint])

        self._masking.submit(work).add_done_callback(lambda done: finish(done, pending))

    # --- masks ------------------------------------------------------------------------------------------------------

    def advance(self, sampled: Sequence[tuple[Constraint, int]]) -> None:
        """Tokens were chosen: have the masks made of those that follow; returns at once."""
        job = self._masking.submit(self._advance, list(sampled))
        for constraint, _ in sampled:
            constraint.pending = job

    def masks(self, constraints: Sequence[Constraint], positions: Sequence[int]) -> list[Mask | None]:
        """Those of the tokens at `positions` of the outputs; waits for them."""
        found = []
        for constraint, position in zip(constraints, positions, strict=True):
            self._wait(constraint, position)
            assert constraint.num_tokens == position, "a mask is about the token behind all those that it has seen"
            found.append(constraint.mask)
        return found

    def _wait(self, constraint: Constraint, position: int) -> None:
        """For its mask. Where that cannot be made the request fails, and the step goes on."""
        assert constraint.pending is not None
        error: BaseException | None
        try:
            error = constraint.pending.exception(MASK_TIMEOUT_S)
        except TimeoutError:
            error = TimeoutError(f"not within {MASK_TIMEOUT_S:g} s")
        if error is not None and not constraint.failure:
            logger.error("a mask could not be made", exc_info=error)
            self._fail(constraint, f"its mask cannot be made: {brief(str(error))}")
        if constraint.failure:
            # A job that failed may not have come to it.
            constraint.num_tokens = position

    def _advance(self, sampled: list[tuple[Constraint, int]]) -> None:
        moving: list[tuple[Constraint, int]] = []
        to_fill = []
        for constraint, token_id in sampled:
            constraint.num_tokens += 1
            if token_id < 0 or constraint.failure:
                # No token was left; the request fails at its commit.
                continue
            if not constraint.has_begun:
                constraint.has_begun = token_id == constraint.begins_after
                if constraint.has_begun:
                    to_fill.append(constraint)
            elif not constraint.has_ended:
                moving.append((constraint, token_id))
                to_fill.append(constraint)
        if moving:
            self._executor.consume_token_par([(constraint.matcher, token_id) for constraint, token_id in moving])
        self._fill(to_fill)

    def _fill(self, constraints: list[Constraint]) -> None:
        if not constraints:
            return
        assert self._trie is not None
        rows = np.zeros((len(constraints), (self._trie.vocab_size + 31) // 32), dtype=np.int32)
        places = [(constraint.matcher, index) for index, constraint in enumerate(constraints)]
        self._executor.unsafe_compute_mask_ptr(places, rows.ctypes.data, rows.shape[1] * 4, len(rows))
        for constraint, row in zip(constraints, rows, strict=True):
            matcher = constraint.matcher
            if matcher.is_error():
                self._fail(constraint, f"the grammar cannot go on: {brief(matcher.get_error())}")
                continue
            constraint.mask = row
            constraint.has_ended = matcher.is_stopped()

    def _fail(self, constraint: Constraint, message: str) -> None:
        constraint.failure = message
        constraint.has_begun = True
        constraint.mask = np.zeros((self._vocab_size + 31) // 32, dtype=np.int32)


def finish(done: Future[None], pending: Future[None]) -> None:
    error = done.exception()
    if error is None:
        pending.set_result(None)
    else:
        pending.set_exception(error)
