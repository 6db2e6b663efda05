"""What a caller may ask for, checked at the edge: a bad request is refused here and never costs a prefill.

`GenerateReqInput` checks each field by itself; `expand` checks it against the engine and turns it into one
`SampleRequest` per prompt and sample. Every refusal is a `ValueError` that names the field and the legal range; in a
batch it names the item, and refuses the whole list.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, Self

import msgspec
import numpy as np
from pydantic import BeforeValidator, Field, PrivateAttr, WithJsonSchema, model_validator

from ..io_struct import OutputOptions
from ..validation import dialect_fields
from ..validation.field_error import FieldError
from ..validation.request_model import AnyNumber, Items, Name, Number, PerPrompt, RequestModel, validate
from ..validation.token_ids import NESTED_SCHEMA, Ids, Prompts, as_prompts
from ..vision.image_store import StoredImage
from .image_placement import PlacedPrompt, with_images
from .request_limits import (
    EngineLimits,
    check_logprobs,
    check_prompt,
    check_routed_experts,
    check_sampling,
    resolve_max_new_tokens,
)
from .sample_names import item_rids, per_item, sample_rids
from .sample_request import SampleRequest, SharedPrefix, check_rooms, with_grammar, with_transfer
from .sampling_params import SamplingParamsInput, make_sampling_params

# What a sample costs to make, beside its prompt's length.
SAMPLE_COST_US = 30.0
# Text is tokenised; ids are looked at.
CHAR_COST_US, ID_COST_US = 1.0, 0.02


# Of `routed_experts_start_len`: where the session's caller already has the rows.
AUTO = "auto"
StartLen = AnyNumber | Literal["auto"]
# For all items of a batch, or one for each.
BootstrapHost = Name | PerPrompt[Name | None] | None
BootstrapNumber = Number | PerPrompt[Number | None] | None


def parse_input_ids(value: Any) -> Prompts:
    return as_prompts(value, "input_ids")


class GenerateReqInput(RequestModel):
    """One request of the native API: one prompt or a batch of prompts. Fields that may be lists have one entry an item."""

    neutral_fields = dialect_fields.GENERATE
    ignored_fields = dialect_fields.GENERATE_IGNORED
    id_fields = ("input_ids",)

    text: str | PerPrompt[str] | None = None
    # Of `text`: special tokens in it are text.
    split_special_tokens: bool = False
    input_ids: Annotated[Any, BeforeValidator(parse_input_ids), WithJsonSchema(NESTED_SCHEMA)] = None
    # Of a prompt: one or more, as data URIs or base64; placeholders in the prompt say where they stand.
    image_data: str | PerPrompt[str | Items[str] | None] | None = None
    sampling_params: SamplingParamsInput | PerPrompt[SamplingParamsInput] = SamplingParamsInput()
    return_logprob: bool | PerPrompt[bool] = False
    logprob_start_len: Number | PerPrompt[Number] = -1
    top_logprobs_num: Number | PerPrompt[Number] = 0
    stream: bool = False
    rid: Name | PerPrompt[Name] | None = None
    session_id: Name | None = None
    priority: Number = Field(0, ge=-(2**31), lt=2**31)
    extra_key: Name | None = None
    cache_salt: Name | None = None
    routed_dp_rank: Number | None = None
    # What the dialect called these two before: `routed_dp_rank` and `session_id`.
    data_parallel_rank: Number | None = None
    routing_key: Name | None = None
    # One engine computes the prompt and another goes on: where the first is, and what both call the request.
    bootstrap_host: BootstrapHost = None
    bootstrap_port: BootstrapNumber = None
    bootstrap_room: BootstrapNumber = None
    return_routed_experts: bool | PerPrompt[bool] = False
    # Checked only where routes are asked for.
    routed_experts_start_len: StartLen | PerPrompt[StartLen] = 0
    routed_experts_format: Literal["int32", "compact", "npy"] = "int32"
    routed_experts_delivery: Literal["inline", "reference"] = "inline"
    stream_routed_experts: bool = False
    return_router_weights: bool | PerPrompt[bool] = False
    return_text_in_logprobs: bool = False
    # Set by a chat of a model that reasons first: the token behind which a grammar begins.
    _grammar_begins_after: int = PrivateAttr(-1)
    # Set by a chat that does not say how long an answer may be: as long as there is room behind its images.
    _fills_room: bool = PrivateAttr(False)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.text is None) == (self.input_ids is None):
            raise ValueError("text, input_ids: give exactly one of them")
        if self.rid is not None and not self.rid:
            raise FieldError("rid: must not be empty", "rid")
        for name, other in (("data_parallel_rank", "routed_dp_rank"), ("routing_key", "session_id")):
            if None not in (getattr(self, name), getattr(self, other)) and getattr(self, name) != getattr(self, other):
                raise FieldError(f"{name}: must be that of {other}, or absent", name, mentions=(other,))
        if self.stream_routed_experts and not (self.stream and self.routed_experts_delivery == "inline"):
            raise FieldError(
                "stream_routed_experts: needs stream=true and routed_experts_delivery='inline'", "stream_routed_experts"
            )
        return self

    @property
    def is_batch(self) -> bool:
        return isinstance(self.input_ids if self.text is None else self.text, list)

    def name_of(self, item: int) -> str | None:
        """What the caller calls the request of this prompt, if anything."""
        return self.rid[item] if isinstance(self.rid, list) else self.rid

    @property
    def dp_rank(self) -> int | None:
        """Which it must go to; None: any."""
        return self.data_parallel_rank if self.routed_dp_rank is None else self.routed_dp_rank

    @property
    def affinity(self) -> str | None:
        """Requests with the same one go to the same dp rank, if they may."""
        return self.routing_key if self.session_id is None else self.session_id

    @property
    def cache_partition(self) -> str:
        """Requests of different ones share no cached prefix. The salt's length stands before it, so that no two pairs of
        salt and key are one."""
        key = self.extra_key or ""
        return key if self.cache_salt is None else f"{len(self.cache_salt)}:{self.cache_salt}{key}"

    @property
    def num_samples(self) -> int:
        """Over all prompts; a list of `sampling_params` that does not fit them is refused later."""
        params = self.sampling_params
        return sum(p.n for p in params) if isinstance(params, list) else params.n * len(self.prompts)

    @property
    def prompts(self) -> list[str] | list[Ids]:
        """The items, as text or as ids."""
        items: Any = self.text if self.text is not None else self.input_ids
        return items if self.is_batch else [items]

    @property
    def grammar_begins_after(self) -> int:
        return self._grammar_begins_after

    @property
    def has_images(self) -> bool:
        entries = self.image_data if isinstance(self.image_data, list) else [self.image_data]
        return any(entry is not None and entry != [] for entry in entries)

    @property
    def fills_room(self) -> bool:
        return self._fills_room

    def fill_room(self) -> None:
        """It is no field either."""
        self._fills_room = True

    def begin_grammar_after(self, token_id: int) -> None:
        """It is no field: callers do not choose it."""
        self._grammar_begins_after = token_id

    @property
    def params_by_item(self) -> list[SamplingParamsInput]:
        params = self.sampling_params
        return params if isinstance(params, list) else [params]

    @property
    def cost_us(self) -> float:
        """About what `expand` takes."""
        each = ID_COST_US if self.text is None else CHAR_COST_US
        grammars = sum(params.grammar_cost_us for params in self.params_by_item)
        return SAMPLE_COST_US * self.num_samples + each * sum(map(len, self.prompts)) + grammars


# Options of the output have the same names in a request, or in its `sampling_params`.
OPTION_NAMES = OutputOptions.__struct_fields__
BOOTSTRAP_NAMES = ("bootstrap_host", "bootstrap_port", "bootstrap_room")
PER_ITEM = (
    "sampling_params",
    *BOOTSTRAP_NAMES,
    *(name for name in OPTION_NAMES if name in GenerateReqInput.model_fields),
)


def parse_generate_request(fields: dict[str, Any]) -> GenerateReqInput:
    """
    Raises:
        ValueError: a field is unknown, unsupported, of the wrong type or out of range; the message names it.
    """
    return validate(GenerateReqInput, fields)


def expand(
    request: GenerateReqInput,
    limits: EngineLimits,
    encode: Callable[[str], list[int]],
    num_delivered: Callable[[str, Ids], int],
    images: Sequence[Sequence[StoredImage]] = (),
    rids: Sequence[str] | None = None,
) -> list[list[SampleRequest]]:
    """Samples per prompt, in order. `num_delivered` says of how many leading tokens a session's caller has the rows;
    `images` are those of each prompt, if any has some; `rids` are `item_rids`, where those are known before.

    Raises:
        ValueError: an item does not fit the engine; nothing of the list is taken then.
    """
    _check_whole(request, limits)
    prompts: list[str] | list[Ids] = request.prompts
    rids = item_rids(request) if rids is None else rids
    columns = {name: per_item(name, getattr(request, name), len(prompts)) for name in PER_ITEM}
    samples = []
    grammars: dict[int, str] = {}
    for index in range(len(prompts)):
        fields = {name: column[index] for name, column in columns.items()}
        try:
            start_of = _check_auto(request, fields, num_delivered)
            prompt = with_images(prompts[index], images[index], limits, encode) if images else prompts[index]
            fields["fills_room"] = request.fills_room
            group = _expand_item(rids[index], index, prompt, fields, limits, encode, start_of)
            params = fields["sampling_params"]
            group = with_grammar(group, params, limits, request.grammar_begins_after, grammars)
            if isinstance(request.bootstrap_room, int):
                # As the dialect counts them.
                fields["bootstrap_room"] += index
            samples.append(with_transfer(group, [fields[name] for name in BOOTSTRAP_NAMES], limits))
        except FieldError as error:
            raise (error.of_item(index) if request.is_batch else error) from None
    _check_rids(samples)
    check_rooms([group[0].transfer for group in samples])
    return samples


def _check_whole(request: GenerateReqInput, limits: EngineLimits) -> None:
    """What concerns no single item."""
    if not request.prompts:
        name = "text" if request.text is not None else "input_ids"
        raise FieldError("the batch is empty: give at least one prompt", name)
    if request.dp_rank is not None and not 0 <= request.dp_rank < limits.dp_size:
        name = "routed_dp_rank" if request.routed_dp_rank is not None else "data_parallel_rank"
        raise FieldError(f"{name}={request.dp_rank}: must lie in 0 .. {limits.dp_size - 1}", name)


def _check_rids(samples: list[list[SampleRequest]]) -> None:
    taken: set[str] = set()
    for sample in (sample for group in samples for sample in group):
        if sample.rid in taken:
            raise FieldError(f"rid: {sample.rid!r} names two samples of this request", "rid")
        taken.add(sample.rid)


def _check_auto(
    request: GenerateReqInput, fields: dict[str, Any], num_delivered: Callable[[str, Ids], int]
) -> Callable[[Ids], int] | None:
    """How to find where an item's rows begin, if it leaves that to its session."""
    name = "routed_experts_start_len"
    if fields[name] != AUTO:
        return None
    if not fields["return_routed_experts"]:
        # Unchecked where nobody opted in.
        fields[name] = 0
        return None
    session_id = request.affinity
    if session_id is None:
        raise FieldError(f"{name}='auto': needs session_id", name, mentions=("session_id",))
    if request.routed_experts_delivery != "inline":
        raise FieldError(
            f"{name}='auto': needs routed_experts_delivery='inline', rows by reference may never be fetched", name
        )
    # The last token of a prompt is computed for every answer anew, so its row is always the answer's own.
    return lambda input_ids: min(num_delivered(session_id, input_ids), len(input_ids) - 1)


def _expand_item(
    rid: str,
    index: int,
    prompt: str | Ids | PlacedPrompt,
    fields: dict[str, Any],
    limits: EngineLimits,
    encode: Callable[[str], list[int]],
    start_of: Callable[[Ids], int] | None,
) -> list[SampleRequest]:
    placed = prompt if isinstance(prompt, PlacedPrompt) else None
    given = prompt.input_ids if isinstance(prompt, PlacedPrompt) else prompt
    input_ids = np.array(encode(given), dtype=np.int32) if isinstance(given, str) else given
    params: SamplingParamsInput = fields["sampling_params"]
    if fields.pop("fills_room"):
        params = fields["sampling_params"] = params.model_copy(
            update={"max_new_tokens": limits.room_for(len(input_ids))}
        )
    check_prompt(input_ids, limits, "text" if isinstance(prompt, str) else "input_ids")
    max_new_tokens = resolve_max_new_tokens(params, len(input_ids), limits)
    check_sampling(params, limits)
    if start_of is not None:
        fields["routed_experts_start_len"] = start_of(input_ids if placed is None else placed.cache_ids)
    options = _output_options(fields, len(input_ids), limits)
    prefix = SharedPrefix(0, options.routed_experts_start_len, len(input_ids) - 1)
    behind = msgspec.structs.replace(options, routed_experts_start_len=prefix.end)
    seed = params.sampling_seed if params.sampling_seed is not None else secrets.randbits(63)
    return [
        SampleRequest(
            rid=sample_rid,
            item=index,
            input_ids=input_ids,
            sampling_params=make_sampling_params(params, max_new_tokens, seed + sample),
            output_options=options if start_of is None or sample == 0 else behind,
            is_auto=start_of is not None,
            shared_prefix=None if start_of is None or sample == 0 else prefix,
            images=() if placed is None else placed.images,
            stored=() if placed is None else placed.stored,
            cache_ids=None if placed is None else placed.cache_ids,
        )
        for sample, sample_rid in enumerate(sample_rids(rid, params.n))
    ]


def _output_options(fields: dict[str, Any], num_prompt: int, limits: EngineLimits) -> OutputOptions:
    params = fields["sampling_params"]
    options = OutputOptions(
        **{name: fields[name] if name in fields else getattr(params, name) for name in OPTION_NAMES}
    )
    check_logprobs(options, num_prompt, limits)
    check_routed_experts(options, num_prompt, limits)
    if options.return_routed_experts:
        return options
    # Unchecked where nobody opted in, so it goes no further.
    return msgspec.structs.replace(options, routed_experts_start_len=0, stream_routed_experts=False)
