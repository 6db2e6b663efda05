"""The contract of scheduler and runner: what a step shall compute, and what came of it.

A `ScheduleBatch` is all that a rank needs to run a step: the leader makes it, sends it to its tp peers as msgpack and
executes it like they do. It names requests by `row`, their row in the page table and in the runner's per-request tensors,
and its size is bounded by the tokens it computes, never by the length of a request - but for the step that admits one,
which carries the pages that the prefix cache gave. The leader's own runner is also told who begins on a row (`NewReq`):
what its tokens are sampled by, where a batch's draws do not say it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import msgspec

from .control.operations import ControlOperation
from .grammar.constraint import Constraint
from .io_struct import FirstToken, OutputOptions, SamplingParams, TopLogprobs, TransferSource
from .vision.placed_image import PlacedImage

TOKEN_BYTES = 4

LaunchedT = TypeVar("LaunchedT")


class ScheduledReq(msgspec.Struct, frozen=True, array_like=True):
    """One request's share of a step: positions `[start, start + num_tokens)`.

    `input_ids` holds their int32 bytes; empty means one token, the last one sampled for `row`, which only the device
    knows yet (its step is in flight). `pages` are entered in the page table from entry `first_page` on. With `sample`
    the last row's logits yield a token. The logits of the rows from `prompt_logprobs_from` of the chunk on score the
    prompt tokens `prompt_logprob_ids`, which follow them. `images` are those that the positions have a part in.
    """

    row: int
    start: int
    num_tokens: int
    input_ids: bytes
    first_page: int
    pages: bytes  # int32
    sample: bool
    prompt_logprobs_from: int = 0
    prompt_logprob_ids: bytes = b""  # int32
    # Of a request with images: see `images_within`.
    rope_delta: int = 0
    images: list[PlacedImage] = []

    @property
    def num_prompt_logprobs(self) -> int:
        return len(self.prompt_logprob_ids) // TOKEN_BYTES


class Draw(msgspec.Struct, frozen=True, array_like=True):
    """What one token is sampled by where nothing but a temperature is asked for: 0 chooses the best token, greedily."""

    temperature: float
    seed: int
    position: int  # of the token in the output
    with_logprob: bool = False


class ScheduleBatch(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    """The plan of one step. Rows of the step's tensors follow the order of `reqs`.

    `num_rows` are the rows that every rank of the world holds between the layers; 0: every rank holds all tokens.
    `is_decode` says that all ranks decode - one token of each request, and another one sampled for it - or have nothing to
    do; `has_images` that a rank's part has tokens of images.

    `draws` are those of the requests that sample, in order, if each of them asks for a temperature alone: then every rank
    chooses among the logits that it holds, and nobody gathers them.
    """

    step: int
    reqs: list[ScheduledReq]
    num_rows: int = 0
    is_decode: bool = False
    has_images: bool = False
    draws: list[Draw] = []

    @property
    def num_tokens(self) -> int:
        return sum(req.num_tokens for req in self.reqs)


@dataclass(frozen=True)
class StepShape:
    """What is the same on all ranks of the world; see `ScheduleBatch`."""

    num_rows: int = 0
    is_decode: bool = False
    has_images: bool = False


@dataclass(frozen=True)
class GraphChoice:
    """The CUDA graph of decodes, or of steps with prefills, that has `num_rows` rows of a rank between the layers."""

    num_rows: int
    is_decode: bool


@dataclass(frozen=True)
class GraphSizes:
    """Rows of a rank between the layers for which the runner has CUDA graphs, ascending; none where it has no graphs."""

    decode: tuple[int, ...] = ()
    prefill: tuple[int, ...] = ()

    def choose(self, num_rows: int, *, is_decode: bool, has_images: bool) -> GraphChoice | None:
        """The smallest that serves a step of so many rows. None: it runs without one, as every step with tokens of images
        does, since graphs take embeddings from ids alone."""
        if has_images:
            return None
        decode = next((size for size in self.decode if size >= num_rows), None) if is_decode else None
        if decode is not None:
            return GraphChoice(decode, True)
        prefill = next((size for size in self.prefill if size >= num_rows), None)
        return None if prefill is None else GraphChoice(prefill, False)

    def pad(self, num_rows: int, *, is_decode: bool, has_images: bool) -> int:
        """Rows to run a step of `num_rows` with: where a graph serves it, the graph's."""
        chosen = self.choose(num_rows, is_decode=is_decode, has_images=has_images)
        return num_rows if chosen is None else chosen.num_rows


class StopPeers(msgspec.Struct, frozen=True, array_like=True, tag="stop"):
    """Tells a tp peer to leave its loop."""


class PeerOperation(msgspec.Struct, frozen=True, array_like=True, tag="operation"):
    """What every rank of the world does between two steps."""

    op_id: str
    operation: ControlOperation


class SharePages(msgspec.Struct, frozen=True, array_like=True, tag="share_pages"):
    """Positions `[0, num_ready)` of a prompt are in the pool, for another engine to fetch; nothing changes them until the
    request is dropped. `pages` are what its page table has grown by. `first` ends it."""

    key: str
    pages: bytes  # int32
    num_ready: int
    first: FirstToken | None = None


class FetchPages(msgspec.Struct, frozen=True, array_like=True, tag="fetch_pages"):
    """Fetch positions `[start, end)` of a prompt to `pages`, its whole page table; see `TransferNotice`."""

    source: TransferSource
    attempt: int
    start: int
    end: int
    pages: bytes  # int32


class DropPages(msgspec.Struct, frozen=True, array_like=True, tag="drop_pages"):
    """The pages of a prompt are somebody else's from the next step on. The other engine is told that it was the end, with
    an `error` if there is one; not where the request will ask `again`."""

    key: str
    error: str = ""
    again: bool = False


PageMessage = SharePages | FetchPages | DropPages
PeerMessage = ScheduleBatch | PeerOperation | StopPeers | PageMessage


class PageTransfers(Protocol):
    """What moves pages between this rank and another engine's, beside the steps. Never blocks for longer than a copy."""

    def handle(self, message: PageMessage) -> None: ...

    def counters(self) -> dict[str, int | float]: ...


@dataclass(frozen=True)
class NewReq:
    """The request that begins, or begins again, on `row`: what its tokens are sampled by.

    `tokens` are the int32 bytes of its prompt, `num_prompt_tokens` of them, and of what it has put out before.
    """

    rid: str
    row: int
    tokens: bytes
    num_prompt_tokens: int
    params: SamplingParams
    options: OutputOptions
    stop_ids: frozenset[int]
    # What its output must follow.
    constraint: Constraint | None = None


@dataclass(frozen=True)
class PromptScores:
    """Log-probabilities of consecutive prompt tokens, and their ranks: 1 for one that is the likeliest at its position."""

    logprobs: list[float]
    top: list[TopLogprobs]
    ranks: list[int]

    def extend(self, more: PromptScores) -> None:
        self.logprobs.extend(more.logprobs)
        self.top.extend(more.top)
        self.ranks.extend(more.ranks)

    @property
    def are_finite(self) -> bool:
        """Whether the logits were; see `score_tokens`."""
        return not any(map(math.isnan, self.logprobs))


@dataclass(frozen=True)
class StepResult:
    """What a step computed, on the host. The lists follow the order of the requests that sample; the entries of one that
    failed mean nothing."""

    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[TopLogprobs]
    # By index of the request in the batch.
    prompt_scores: dict[int, PromptScores] = field(default_factory=dict)
    # Likewise: why a request cannot go on. What the step left of it in the cache must not be used.
    failures: dict[int, str] = field(default_factory=dict)
    # What the step ran as.
    graph: GraphChoice | None = None


class Runner(Protocol[LaunchedT]):
    """Executes plans on this rank and decides nothing. `launch` enqueues a step; `result` waits for it."""

    def start_req(self, req: NewReq) -> None: ...

    def launch(self, batch: ScheduleBatch) -> LaunchedT: ...

    def result(self, launched: LaunchedT) -> StepResult: ...
