"""The messages between processes; those of a frontend and leaders are in `ipc/frontend_messages.py`, plans in `plan.py`.

All are msgspec structs: typed, validated when decoded, never pickled; neither torch nor what decides is imported here.

Token ids and page numbers travel as raw little-endian int32 bytes: a long prompt costs no Python object per token. Route
rows never stand in these structs: they follow their envelope as a ZMQ frame of their own.

Directions:

    frontend -> leader             NumberedMessage, GetInternalStateReq; see `ipc/frontend_messages.py`
    leader -> output processor     RoutingSetup once, then StepRecord, one a step; to tp peers see `plan.py`
    leader -> frontend             ControlReply, there as well
    output processor -> frontend   OutputBatch, followed by one frame of rows per output that has `routed_experts`, and one
                                   of combine weights behind it if it has `router_weights`
    frontend <-> output processor  OutputQuery / OutputReply; a claim's rows follow as a frame
"""

from __future__ import annotations

from typing import Literal

import msgspec

from .routing.geometry import RouteGeometry

# Below it a token is chosen greedily.
GREEDY_TEMPERATURE = 1e-5


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How one request's tokens are chosen. Validated at the edge; the names are those of the field's `/generate`."""

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: dict[int, float] = {}
    # Nothing else is sampled; (): anything.
    allowed_token_ids: tuple[int, ...] = ()
    # The frontend draws one where the caller gives none, so that a retracted request samples the same tokens again.
    sampling_seed: int = 0
    # For llguidance; "": anything goes. It begins behind the first token `grammar_begins_after`, or (-1) at once.
    grammar: str = ""
    grammar_begins_after: int = -1

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE or self.top_k == 1

    @property
    def is_filtered(self) -> bool:
        """Whether a random choice is among some of the tokens alone."""
        return not self.is_greedy and (self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0)

    @property
    def has_penalties(self) -> bool:
        return self.frequency_penalty != 0.0 or self.presence_penalty != 0.0 or self.repetition_penalty != 1.0


class OutputOptions(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one request's answer has in it, and how it comes. It travels as one value from the edge, which validates it, to
    the output processor; the names are those of the field's `/generate`."""

    stream: bool = False
    # What the text is made of.
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    return_logprob: bool = False
    # -1: none of the prompt's.
    logprob_start_len: int = -1
    top_logprobs_num: int = 0
    return_text_in_logprobs: bool = False
    return_routed_experts: bool = False
    routed_experts_start_len: int = 0
    # "int32" and "npy" have the rows that readers of the dialects count on, "compact" those of all tokens that were inputs.
    routed_experts_format: Literal["int32", "compact", "npy"] = "int32"
    # "reference" leaves the rows with the output processor and answers with a claim.
    routed_experts_delivery: Literal["inline", "reference"] = "inline"
    # Every output of a stream carries the rows that became available since the last one.
    stream_routed_experts: bool = False
    # The combine weights of the same rows, beside them.
    return_router_weights: bool = False

    @property
    def returns_prompt_logprobs(self) -> bool:
        return self.return_logprob and self.logprob_start_len >= 0

    def num_scored(self, num_prompt_tokens: int) -> int:
        """How many of the prompt's tokens have a log-probability in the answer, the first one's None included."""
        return max(0, num_prompt_tokens - self.logprob_start_len) if self.returns_prompt_logprobs else 0


class TransferSource(msgspec.Struct, frozen=True, array_like=True):
    """Where a request's prefill is, if another engine than that decodes it, and what both call one `sample` of it.
    `digest` is of what both must have been asked, for a room says nothing of that."""

    host: str
    port: int
    room: int
    sample: int = 0
    digest: bytes = b""

    @property
    def key(self) -> str:
        return f"{self.room}.{self.sample}"


# --- leader -> output processor -------------------------------------------------------------------------------------


class FinishReason(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a request ended: `stop` (with what matched), `length` (with how many tokens) or `abort` (with a message).

    With a stop string that matched, `text_length` characters of the caller's text stand before it. An abort that is an
    error of the engine has an HTTP status and the type of the error, too: see `failed`.
    """

    type: str
    matched: int | str | None = None
    text_length: int | None = None
    length: int | None = None
    message: str | None = None
    status_code: int | None = None
    err_type: str | None = None

    @staticmethod
    def failed(message: str) -> FinishReason:
        """The engine could not go on with this request; others are not concerned."""
        return FinishReason("abort", message=message, status_code=500, err_type="InternalServerError")

    @property
    def is_failure(self) -> bool:
        return self.status_code is not None and self.status_code >= 500


class ReqStarted(msgspec.Struct, frozen=True, tag="started"):
    """Before-event: the leader has taken the request in; nothing is allocated yet."""

    rid: str
    num_prompt_tokens: int
    options: OutputOptions = OutputOptions()
    stop: tuple[str, ...] = ()
    # Its prompt's rows go to another engine, or come from one.
    transfer: TransferSource | None = None


class ReqAdmitted(msgspec.Struct, frozen=True, tag="admitted"):
    """Before-event: the request runs (again, after a retraction) on these pages of the prefix cache, whole pages only."""

    rid: str
    cached_pages: bytes  # int32


class ReqRetracted(msgspec.Struct, frozen=True, tag="retracted"):
    """Before-event: the request gives its pages up and waits; rows filed so far answer for it from now on."""

    rid: str


class ReqTransferred(msgspec.Struct, frozen=True, tag="transferred"):
    """Before-event: the pages that an admitted request lacked have arrived from another engine's prefill; so have their
    rows, unless there are none, and the prompt's log-probabilities, which the output processor adds to the `output` that
    the prefill has put out, under `weight_version`; with a `reason` that is all there is."""

    rid: str
    new_pages: bytes  # int32
    weight_version: str
    output: TokenOutput | None = None
    reason: FinishReason | None = None


class CacheFlushed(msgspec.Struct, frozen=True, tag="flushed"):
    """Before-event: every cached page was dropped."""


class ReqFinished(msgspec.Struct, frozen=True, tag="finished"):
    """After-event: no more tokens; slice, detokenise, ship, forget."""

    rid: str
    reason: FinishReason


BeforeEvent = ReqStarted | ReqAdmitted | ReqRetracted | ReqTransferred | CacheFlushed


class Segment(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive rows of a step: tokens `[start, start + num_tokens)` of one request, in the order of the ring slot.

    `new_pages` are the pages allocated for them, appended to the request's page table; allocating a page invalidates
    the rows that its slots held. A discarded segment is the overrun of a request that finished a step earlier, or the
    step in which it failed: its rows occupy the ring slot and belong to nobody.
    """

    rid: str
    start: int
    num_tokens: int
    new_pages: bytes  # int32
    discarded: bool = False


# (logprob, token id) of the likeliest tokens of one position.
TopLogprobs = list[tuple[float, int]]


class Logprobs(msgspec.Struct, array_like=True):
    """Log-probabilities of one request that belong to the same piece of its output. Only who asks has one: the others have
    None in its place, at no cost for each of their tokens.

    `output` has one entry a token, `input` one a prompt position that was scored: (logprob or None at position 0, token
    id). The top ones, where they are asked for, are parallel to them.
    """

    output: list[float] = []
    output_top: list[TopLogprobs] = []
    input: list[tuple[float | None, int]] = []
    input_top: list[TopLogprobs | None] = []
    # Parallel to `input`: 1 for a token that is the likeliest at its position.
    input_ranks: list[int | None] = []

    def extend(self, more: Logprobs) -> None:
        self.output.extend(more.output)
        self.output_top.extend(more.output_top)
        self.input.extend(more.input)
        self.input_top.extend(more.input_top)
        self.input_ranks.extend(more.input_ranks)

    def of_prompt(self, start: int, end: int) -> Logprobs:
        """A copy of those in `input` from number `start` to `end`, with what is parallel to them."""
        cut = slice(start, end)
        return Logprobs(input=self.input[cut], input_top=self.input_top[cut], input_ranks=self.input_ranks[cut])


class TokenOutput(msgspec.Struct, frozen=True, array_like=True):
    """Tokens that a step committed for one request; a run of one or more, so that speculative decoding fits. A prefill that
    scores prompt positions may have none."""

    rid: str
    token_ids: list[int]
    logprobs: Logprobs | None = None


class FirstToken(msgspec.Struct, frozen=True, array_like=True):
    """What a prefill has come to, for the engine that goes on: a token, or none, its log-probabilities, and the digest of
    what it was asked (`TransferSource`). Those of the prompt go with its rows, as leaders handle this one."""

    token_ids: list[int]
    weight_version: str
    logprobs: Logprobs | None = None
    digest: bytes = b""


class RingPlace(msgspec.Struct, frozen=True, array_like=True):
    """Where a ring is, for `RouteRing.attach`."""

    path: str
    num_slots: int


class RoutingSetup(msgspec.Struct, frozen=True, array_like=True, tag="routing_setup"):
    """First message of a dp rank: the sizes of its KV pool and, with routing on, the shape of a step's routing; from the
    rank that records also where the ring is."""

    dp_rank: int
    num_pages: int
    page_size: int
    geometry: RouteGeometry | None = None
    ring: RingPlace | None = None


class StepRecord(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    """What step `step` of one dp rank did. The order of its parts is the order in which they apply: `before`, the rows of
    `segments` (in ring slot `ring_seq` from row `first_row` on; -1 when the step ran no forward), `outputs`, `after`.
    Every forward has a record from every dp rank, also from one that had no tokens in it."""

    dp_rank: int
    step: int
    ring_seq: int
    first_row: int
    weight_version: str
    before: list[BeforeEvent] = []
    segments: list[Segment] = []
    outputs: list[TokenOutput] = []
    after: list[ReqFinished] = []


OutputRecord = RoutingSetup | StepRecord


# --- output processor -> frontend -----------------------------------------------------------------------------------


class RoutedExpertsMeta(msgspec.Struct, frozen=True):
    """Envelope of a block of rows, ids or combine weights: enough to decode and verify it without any other knowledge.

    The bytes are C-order `[rows, num_layers, top_k]`; row i is the routing of the token at absolute position
    `start + i` as an input. `weight_versions` are runs `(version, start, end)` of absolute positions, half-open.
    """

    start: int
    rows: int
    num_layers: int
    layer_ids: list[int]
    top_k: int
    dtype: str
    byte_order: str
    weight_versions: list[tuple[str, int, int]]
    checksum: str


class RequestOutput(msgspec.Struct, frozen=True):
    """Progress of one request. Text, tokens and log-probabilities are what is new since its last output; the rest is the
    state now."""

    rid: str
    text: str
    token_ids: list[int]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    num_retractions: int
    weight_version: str
    dp_rank: int
    finish_reason: FinishReason | None = None
    logprobs: Logprobs | None = None
    routed_experts: RoutedExpertsMeta | None = None
    # Beside them where they were asked for; missing with them.
    router_weights: RoutedExpertsMeta | None = None
    # Set when the rows stay with the output processor; then no frame follows for them.
    routed_experts_claim: str | None = None
    routed_experts_error: str | None = None
    # With a finish reason: the output processor failed it, and the engine still runs it, for the reader to abort.
    is_at_engine: bool = False
    # Of all tokens so far: runs `(version, start, end)`, half-open, the first token being 0.
    token_weight_versions: list[tuple[str, int, int]] = []
    # With a finish reason and tokens: how long before this output was made the first token had come.
    first_token_ago_s: float | None = None


class OutputBatch(msgspec.Struct, frozen=True, tag="outputs"):
    """Outputs of one step. A frame of rows follows, in order, for every output with meta and without a claim, and one of
    their combine weights where it has `router_weights`."""

    outputs: list[RequestOutput]
    # Of requests that were told to have failed while they were `is_at_engine`, those that the engine has ended since.
    left: list[str] = []
