"""What a step works on: `Req` (one request's state on the leader) and `ScheduleBatch` (an immutable plan of one step).

A plan is all that a rank needs to run a step: the leader makes it, sends it to its tp peers as msgpack and executes it
like they do. It names requests by `row`, their row in the page table and in the runner's per-request tensors, and its
size is bounded by the tokens it computes, never by the length of a request - but for the step that admits one, which
carries the pages that the prefix cache gave.

    positions of one request   0 ......... cached ......... scheduled ......... prompt + sampled
    KV from the prefix cache   [0, cached)
    computed, or in flight                [cached, scheduled)
    not an input yet                                        [scheduled, prompt + sampled)
    known to the host          [0, seqlen), where seqlen = prompt + committed output <= prompt + sampled
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from .control_operations import ControlOperation
from .frontend_messages import TokenizedGenerateReqInput
from .io_struct import FinishReason, OutputOptions, ReqStarted, SamplingParams
from .kv_cache.page_pool import Pages, no_pages
from .kv_cache.radix_cache import Node

TOKEN_BYTES = 4


class ScheduledReq(msgspec.Struct, frozen=True, array_like=True):
    """One request's share of a step: positions `[start, start + num_tokens)`.

    `input_ids` holds their int32 bytes; empty means one token, the last one sampled for `row`, which only the device
    knows yet (its step is in flight). `pages` are entered in the page table from entry `first_page` on. With `sample`
    the last row's logits yield a token. The logits of `num_prompt_logprobs` rows, counted from row
    `prompt_logprobs_from` of the chunk, score the prompt tokens after them.
    """

    row: int
    start: int
    num_tokens: int
    input_ids: bytes
    first_page: int
    pages: bytes  # int32
    sample: bool
    prompt_logprobs_from: int = 0
    num_prompt_logprobs: int = 0


class ScheduleBatch(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    """The plan of one step. Rows of the step's tensors follow the order of `reqs`.

    `num_rows` are the rows that every rank of the world holds between the layers; 0: every rank holds all tokens.
    """

    step: int
    reqs: list[ScheduledReq]
    num_rows: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(req.num_tokens for req in self.reqs)


class StopPeers(msgspec.Struct, frozen=True, array_like=True, tag="stop"):
    """Tells a tp peer to leave its loop."""


class PeerOperation(msgspec.Struct, frozen=True, array_like=True, tag="operation"):
    """What every rank of the world does between two steps."""

    op_id: str
    operation: ControlOperation


PeerMessage = ScheduleBatch | PeerOperation | StopPeers


@dataclass(eq=False)
class Req:
    """A request on its leader, from receipt to finish. Only the scheduler changes it."""

    recv: TokenizedGenerateReqInput
    arrival: int
    # Prompt and committed output ids as int32 bytes: a page's key is a slice of it.
    tokens: bytearray
    output_ids: list[int] = field(default_factory=list)

    # Valid while it runs.
    row: int = -1
    node: Node | None = None
    pages: Pages[int] = field(default_factory=no_pages)
    # Pages [0, num_offered_pages) are full and were offered to the prefix cache; those it did not take are `duplicates`.
    num_offered_pages: int = 0
    duplicates: Pages[int] = field(default_factory=no_pages)
    num_cached: int = 0
    num_scheduled: int = 0
    num_committed: int = 0
    # Tokens sampled or being sampled; runs ahead of `output_ids` by the steps in flight.
    num_sampled: int = 0

    # Valid while it waits: a running request whose prefill brings so many of its pages; see `shared_prefills`.
    awaited: Req | None = None
    num_awaited_pages: int = 0

    num_retractions: int = 0
    # The next prompt position to score, where prompt log-probabilities were asked for.
    num_scored: int = 0
    finish_reason: FinishReason | None = None

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

    @property
    def order(self) -> tuple[int, int]:
        """Sort key: higher priority first, then by arrival."""
        return (-self.recv.priority, self.arrival)

    def started(self) -> ReqStarted:
        """What the output processor has to know of it."""
        return ReqStarted(self.rid, self.num_prompt_tokens, self.options, self.params.stop)

    def token_bytes(self, start: int, end: int) -> bytes:
        return bytes(self.tokens[start * TOKEN_BYTES : end * TOKEN_BYTES])

    def leave_pool(self) -> None:
        """Forget everything that is valid only while it runs. The sampled count falls back to what is committed."""
        self.row = -1
        self.node = None
        self.pages = no_pages()
        self.num_offered_pages = 0
        self.duplicates = no_pages()
        self.num_cached = 0
        self.num_scheduled = 0
        self.num_committed = 0
        self.num_sampled = len(self.output_ids)
