"""What a caller may ask for, checked at the edge: a bad request is refused here and never costs a prefill.

`GenerateReqInput` checks each field by itself; `expand` checks it against the engine and turns it into one
`SampleRequest` per prompt and sample. Every refusal is a `ValueError` that names the field and the legal range; in a
batch it names the item, and refuses the whole list.
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from .io_struct import SamplingParams
from .request_limits import (
    EngineLimits,
    check_logprobs,
    check_prompt,
    check_routed_experts,
    check_sampling,
    resolve_max_new_tokens,
)
from .sampling_input import Number, SamplingParamsInput, drop_dialect_fields, has_surrogate, make_sampling_params

MAX_NAME_CHARS = 512


def check_utf8(name: str) -> str:
    if has_surrogate(name):
        raise ValueError("must be text that UTF-8 can encode")
    return name


# Prompts are long: checked by pydantic's core, an item at a time.
TokenId = Annotated[int, Field(strict=True)]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS), AfterValidator(check_utf8)]

# Fields of the dialect that change the result and are not implemented: legal at the value that means "off".
NEUTRAL_FIELDS: dict[str, Any] = {
    "image_data": None,
    "audio_data": None,
    "video_data": None,
    "input_embeds": None,
    "lora_path": None,
    "lora_id": None,
    "custom_logit_processor": None,
    "return_hidden_states": False,
    "token_ids_logprob": None,
    "session_params": None,
}
# Fields of the dialect that change nothing in the result.
IGNORED_FIELDS = (
    "log_metrics",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "modalities",
)


class GenerateReqInput(BaseModel):
    """One request of the native API: one prompt or a batch of prompts. Fields that may be lists have one entry an item."""

    model_config = ConfigDict(extra="forbid")

    text: str | list[str] | None = None
    input_ids: list[TokenId] | list[list[TokenId]] | None = None
    sampling_params: SamplingParamsInput | list[SamplingParamsInput] = SamplingParamsInput()
    return_logprob: bool | list[bool] = False
    logprob_start_len: Number | list[Number] = -1
    top_logprobs_num: Number | list[Number] = 0
    stream: bool = False
    rid: Name | list[Name] | None = None
    session_id: Name | None = None
    priority: Number = Field(0, ge=-(2**31), lt=2**31)
    extra_key: Name | None = None
    routed_dp_rank: Number | None = None
    return_routed_experts: bool | list[bool] = False
    routed_experts_start_len: Number | list[Number] = 0
    routed_experts_format: Literal["int32", "compact"] = "int32"
    routed_experts_delivery: Literal["inline", "reference"] = "inline"
    stream_routed_experts: bool = False
    return_text_in_logprobs: bool = False

    @model_validator(mode="before")
    @classmethod
    def _drop_dialect_fields(cls, data: Any) -> Any:
        return drop_dialect_fields(data, NEUTRAL_FIELDS, IGNORED_FIELDS)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.text is None) == (self.input_ids is None):
            raise ValueError("text, input_ids: give exactly one of them")
        if self.rid is not None and not self.rid:
            raise ValueError("rid: must not be empty")
        if self.stream_routed_experts and not (self.stream and self.routed_experts_delivery == "inline"):
            raise ValueError("stream_routed_experts: needs stream=true and routed_experts_delivery='inline'")
        texts = [self.text] if isinstance(self.text, str) else self.text or []
        if any(map(has_surrogate, texts)):
            raise ValueError("text: must be text that UTF-8 can encode")
        return self

    @property
    def is_batch(self) -> bool:
        if self.text is not None:
            return isinstance(self.text, list)
        assert self.input_ids is not None
        # An empty list is one empty prompt, refused as such.
        return bool(self.input_ids) and isinstance(self.input_ids[0], list)

    @property
    def num_samples(self) -> int:
        """Over all prompts; a list of `sampling_params` that does not fit them is refused later."""
        params = self.sampling_params
        return sum(p.n for p in params) if isinstance(params, list) else params.n * len(self.prompts)

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The items, as text or as ids."""
        items: Any = self.text if self.text is not None else self.input_ids
        return items if self.is_batch else [items]


@dataclass(frozen=True)
class SampleRequest:
    """One sample of one prompt, fully checked."""

    rid: str
    item: int
    input_ids: list[int]
    sampling_params: SamplingParams
    return_logprob: bool
    logprob_start_len: int
    top_logprobs_num: int
    return_routed_experts: bool
    routed_experts_start_len: int


def parse_generate_request(fields: dict[str, Any]) -> GenerateReqInput:
    """
    Raises:
        ValueError: a field is unknown, unsupported, of the wrong type or out of range; the message names it.
    """
    try:
        return GenerateReqInput.model_validate(fields)
    except ValidationError as error:
        raise ValueError(
            describe(error.errors(include_url=False, include_context=False, include_input=False))
        ) from None


# What pydantic adds to a field's place for the branches of a union.
BRANCHES = ("body", "SamplingParamsInput", "int", "str", "bool", "float")


def describe(errors: Sequence[Any]) -> str:
    """The first of pydantic's errors, in the form of our own messages: the field, then what is wrong."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return f"body: must be JSON: {first['ctx']['error']}"
    if tuple(first["loc"]) == ("body",) and first["type"] in ("model_attributes_type", "dict_type"):
        return "body: must be a JSON object, sent with Content-Type: application/json"
    parts = [part for part in first["loc"] if isinstance(part, int) or (part.isidentifier() and part not in BRANCHES)]
    if first["type"] == "extra_forbidden" and first["loc"][-1] not in parts:
        parts.append(repr(first["loc"][-1]))
    where = ".".join(map(str, parts))
    if first["type"] == "extra_forbidden":
        return f"{where}: is no field of this request"
    reason = first["msg"].removeprefix("Value error, ")
    return f"{where}: {reason}" if where else reason


def expand(
    request: GenerateReqInput, limits: EngineLimits, encode: Callable[[str], list[int]]
) -> list[list[SampleRequest]]:
    """Samples per prompt, in order.

    Raises:
        ValueError: an item does not fit the engine; nothing of the list is taken then.
    """
    prompts: list[str] | list[list[int]] = request.prompts
    if not prompts:
        raise ValueError("the batch is empty: give at least one prompt")
    num = len(prompts)
    rids = _rids(request, num)
    columns = {
        name: _per_item(name, getattr(request, name), num)
        for name in (
            "sampling_params",
            "return_logprob",
            "logprob_start_len",
            "top_logprobs_num",
            "return_routed_experts",
            "routed_experts_start_len",
        )
    }
    if request.routed_dp_rank is not None and not 0 <= request.routed_dp_rank < limits.dp_size:
        raise ValueError(f"routed_dp_rank={request.routed_dp_rank}: must lie in 0 .. {limits.dp_size - 1}")
    samples = []
    for index in range(num):
        fields = {name: column[index] for name, column in columns.items()}
        try:
            samples.append(_expand_item(rids[index], index, prompts[index], fields, limits, encode))
        except ValueError as error:
            raise ValueError(f"item {index}: {error}" if request.is_batch else str(error)) from None
    taken: set[str] = set()
    for sample in (sample for group in samples for sample in group):
        if sample.rid in taken:
            raise ValueError(f"rid: {sample.rid!r} names two samples of this request")
        taken.add(sample.rid)
    return samples


def _rids(request: GenerateReqInput, num: int) -> list[str]:
    if request.rid is None:
        return [uuid.uuid4().hex for _ in range(num)]
    if isinstance(request.rid, str):
        return [request.rid] if not request.is_batch else [f"{request.rid}_{i}" for i in range(num)]
    rids = _per_item("rid", request.rid, num)
    if len(set(rids)) != num:
        raise ValueError("rid: the entries must differ")
    return rids


def _per_item(name: str, value: Any, num: int) -> list[Any]:
    """A field's value for every item: a list as it is, anything else repeated."""
    if not isinstance(value, list):
        return [value] * num
    if len(value) != num:
        raise ValueError(f"{name}: has {len(value)} entries, must have one per prompt, {num}")
    return value


def _expand_item(
    rid: str,
    index: int,
    prompt: str | list[int],
    fields: dict[str, Any],
    limits: EngineLimits,
    encode: Callable[[str], list[int]],
) -> list[SampleRequest]:
    if isinstance(prompt, str) and not limits.has_tokenizer:
        raise ValueError("text: the checkpoint has no tokenizer; give input_ids")
    input_ids = encode(prompt) if isinstance(prompt, str) else prompt
    params: SamplingParamsInput = fields["sampling_params"]
    check_prompt(input_ids, limits)
    max_new_tokens = resolve_max_new_tokens(params, len(input_ids), limits)
    check_sampling(params, limits)
    check_logprobs(fields, len(input_ids), limits)
    check_routed_experts(fields, len(input_ids), limits)
    seed = params.sampling_seed if params.sampling_seed is not None else secrets.randbits(63)
    return [
        SampleRequest(
            rid=rid if params.n == 1 else f"{rid}_{sample}",
            item=index,
            input_ids=input_ids,
            sampling_params=make_sampling_params(params, max_new_tokens, seed + sample),
            return_logprob=fields["return_logprob"],
            logprob_start_len=fields["logprob_start_len"],
            top_logprobs_num=fields["top_logprobs_num"],
            return_routed_experts=fields["return_routed_experts"],
            # Unchecked where nobody opted in, so it goes no further.
            routed_experts_start_len=fields["routed_experts_start_len"] if fields["return_routed_experts"] else 0,
        )
        for sample in range(params.n)
    ]
