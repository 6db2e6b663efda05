"""One request's state on its leader.

positions of one request   0 ......... cached ......... scheduled ......... prompt + sampled
KV from the prefix cache   [0, cached)
computed, or in flight                [cached, scheduled)
not an input yet                                        [scheduled, prompt + sampled)
known to the host          [0, seqlen), where seqlen = prompt + committed output <= prompt + sampled
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..grammar.constraint import Constraint
from ..io_struct import FinishReason, OutputOptions, ReqStarted, SamplingParams
from ..ipc.frontend_messages import TokenizedGenerateReqInput
from ..kv_cache.page_pool import Pages, no_pages
from ..kv_cache.radix_cache import Node
from ..plan import TOKEN_BYTES


@dataclass(slots=True)
class HeldPages:
    """The pages of one running request; a waiting one holds none.

    `node`: how far the prefix cache knows the request's tokens, locked for it. `PageManager` alone changes what is here,
    apart from new pages, which the planner adds.
    """

    node: Node | None = None
    pages: Pages[int] = field(default_factory=no_pages)
    # Pages [0, num_offered) are full and were offered to the prefix cache; those it did not take are `duplicates`.
    num_offered: int = 0
    duplicates: Pages[int] = field(default_factory=no_pages)


@dataclass(frozen=True)
class AwaitedPages:
    """Those that a request waits for: `prefill`, which runs, brings its first `num_pages`; see `shared_prefills`."""

    prefill: Req
    num_pages: int

    @property
    def are_to_come(self) -> bool:
        return self.prefill.is_running and self.prefill.held.num_offered < self.num_pages


class PlainSampling(NamedTuple):
    """See `plan.Draw`. The first token has position `num_prompt_tokens` of the sequence; from `first_free` on a stop token
    may be sampled."""

    temperature: float
    seed: int
    with_logprob: bool
    num_prompt_tokens: int
    first_free: int


@dataclass(eq=False)
class Req:
    """A request on its leader, from receipt to finish. Only the scheduler changes it."""

    recv: TokenizedGenerateReqInput
    # Prompt and committed output ids as int32 bytes: a page's key is a slice of it.
    tokens: bytearray
    # What the prefix cache knows them by, where that is something else.
    image_keys: bytearray | None = None
    output_ids: list[int] = field(default_factory=list)

    # Valid while it runs.
    row: int = -1
    held: HeldPages = field(default_factory=HeldPages)
    num_cached: int = 0
    num_scheduled: int = 0
    num_committed: int = 0
    # Tokens sampled or being sampled; runs ahead of `output_ids` by the steps in flight.
    num_sampled: int = 0

    # Valid while it waits.
    awaited: AwaitedPages | None = None

    # The next prompt position to score, where prompt log-probabilities were asked for.
    num_scored: int = 0
    finish_reason: FinishReason | None = None
    # Its pages are lent to another engine, which goes on with it: it keeps them to its end.
    is_lent: bool = False
    # Its prompt is another engine's to compute, and has not arrived.
    is_awaited: bool = False
    # What its output must follow; it lasts through retractions, as the output does.
    constraint: Constraint | None = None

    @property
    def rid(self) -> str:
        return self.recv.rid

    @property
    def params(self) -> SamplingParams:
        return self.recv.sampling_params

    @property
    def options(self) -> OutputOptions:
        return self.recv.output_options

    @property
    def num_prompt_tokens(self) -> int:
        return self.recv.num_prompt_tokens

    @property
    def seqlen(self) -> int:
        """Prompt and committed output tokens."""
        return len(self.tokens) // TOKEN_BYTES

    @property
    def is_compiling(self) -> bool:
        """Whether its grammar is: until then it waits, and others go past it."""
        return self.constraint is not None and not self.constraint.is_ready

    @property
    def is_running(self) -> bool:
        return self.row >= 0

    @property
    def num_remaining(self) -> int:
        """Tokens, known or in flight, that no step has as input yet. 1 while it decodes."""
        return self.num_prompt_tokens + self.num_sampled - self.num_scheduled

    @property
    def is_decoding(self) -> bool:
        return self.num_sampled > 0 and self.num_remaining == 1

    @property
    def is_exhausted(self) -> bool:
        """Whether nothing is left to schedule: its last token is sampled, or in flight."""
        if self.params.max_new_tokens == 0:
            return self.num_remaining == 0
        return self.num_sampled == self.params.max_new_tokens

    @cached_property
    def plain(self) -> PlainSampling | None:
        """What its tokens are sampled by, where that is no more than a temperature."""
        params = self.params
        is_adjusted = params.has_penalties or bool(params.logit_bias) or bool(params.allowed_token_ids)
        if is_adjusted or params.is_filtered or params.grammar or self.options.top_logprobs_num:
            return None
        return PlainSampling(
            0.0 if params.is_greedy else params.temperature,
            params.sampling_seed,
            self.options.return_logprob,
            self.num_prompt_tokens,
            self.num_prompt_tokens + params.min_new_tokens,
        )

    @property
    def order(self) -> tuple[int, int]:
        """Sort key: higher priority first, then by the frontend's numbers, which rise."""
        return (-self.recv.priority, self.recv.seq)

    def started(self) -> ReqStarted:
        """What the output processor has to know of it."""
        return ReqStarted(self.rid, self.num_prompt_tokens, self.options, self.params.stop, self.recv.transfer)

    @property
    def cache_keys(self) -> bytearray:
        """What the prefix cache knows `tokens` by: tokens of other images are other ones."""
        return self.tokens if self.image_keys is None else self.image_keys

    def append(self, token_ids: Sequence[int]) -> None:
        """Committed output."""
        added = np.array(token_ids, dtype="<i4").tobytes()
        self.tokens += added
        if self.image_keys is not None:
            self.image_keys += added

    def token_bytes(self, start: int, end: int) -> bytes:
        return bytes(self.tokens[start * TOKEN_BYTES : end * TOKEN_BYTES])

    def leave_pool(self) -> None:
        """Forget everything that is valid only while it runs. The sampled count falls back to what is committed."""
        self.row = -1
        self.held = HeldPages()
        self.num_cached = 0
        self.num_scheduled = 0
        self.num_committed = 0
        self.num_sampled = len(self.output_ids)
