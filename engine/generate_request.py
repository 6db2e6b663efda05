"""What a caller may ask for, checked at the edge: a bad request is refused here and never costs a prefill.

`GenerateReqInput` checks each field by itself; `expand` checks it against the engine and turns it into one
`SampleRequest` per prompt and sample. Every refusal is a `ValueError` that names the field and the legal range; in a
batch it names the item, and refuses the whole list.
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .io_struct import SamplingParams

MAX_TOP_LOGPROBS = 100
DEFAULT_MAX_NEW_TOKENS = 128

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
NEUTRAL_SAMPLING_FIELDS: dict[str, Any] = {
    "json_schema": None,
    "regex": None,
    "ebnf": None,
    "structural_tag": None,
    "stop_regex": None,
    "custom_params": None,
    "beam_width": None,
}
# Fields of the dialect that change nothing in the result.
IGNORED_FIELDS = (
    "log_metrics",
    "return_text_in_logprobs",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "modalities",
)
IGNORED_SAMPLING_FIELDS = ("spaces_between_special_tokens", "stream_interval")


def drop_dialect_fields(data: Any, neutral: dict[str, Any], ignored: tuple[str, ...]) -> Any:
    """Accept known fields that are off or change nothing; refuse the others by name."""
    if not isinstance(data, dict):
        return data
    kept = dict(data)
    for name, off in neutral.items():
        if name in kept and kept.pop(name) != off:
            raise ValueError(f"{name} is not supported: must be {off!r} or absent")
    for name in ignored:
        kept.pop(name, None)
    return kept


class SamplingParamsInput(BaseModel):
    """`sampling_params` of a request."""

    model_config = ConfigDict(extra="forbid", strict=False)

    max_new_tokens: Annotated[int, Field(ge=0)] | None = None
    min_new_tokens: int = Field(0, ge=0)
    temperature: float = Field(1.0, ge=0.0, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_k: int = Field(-1, ge=-1)
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    frequency_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    presence_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    repetition_penalty: float = Field(1.0, gt=0.0, le=2.0)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    logit_bias: dict[int, float] | None = None
    sampling_seed: int | None = None
    n: int = Field(1, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _drop_dialect_fields(cls, data: Any) -> Any:
        return drop_dialect_fields(data, NEUTRAL_SAMPLING_FIELDS, IGNORED_SAMPLING_FIELDS)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_k == 0:
            raise ValueError("top_k=0: must be -1 (off) or at least 1")
        if "" in self.stop_strings:
            raise ValueError("stop: an empty string would stop everything")
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens}: must be at most max_new_tokens={self.max_new_tokens}"
            )
        return self

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class GenerateReqInput(BaseModel):
    """One request of the native API: one prompt or a batch of prompts. Fields that may be lists have one entry an item."""

    model_config = ConfigDict(extra="forbid")

    text: str | list[str] | None = None
    input_ids: list[int] | list[list[int]] | None = None
    sampling_params: SamplingParamsInput | list[SamplingParamsInput] = SamplingParamsInput()
    return_logprob: bool | list[bool] = False
    logprob_start_len: int | list[int] = -1
    top_logprobs_num: int | list[int] = 0
    stream: bool = False
    rid: str | list[str] | None = None
    session_id: str | None = None
    priority: int = 0
    extra_key: str | None = None
    routed_dp_rank: int | None = None
    return_routed_experts: bool | list[bool] = False
    routed_experts_start_len: int | list[int] = 0
    routed_experts_format: Literal["int32", "compact"] = "int32"
    routed_experts_delivery: Literal["inline", "reference"] = "inline"

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
        return self

    @property
    def is_batch(self) -> bool:
        if self.text is not None:
            return isinstance(self.text, list)
        assert self.input_ids is not None
        # An empty list is one empty prompt, refused as such.
        return bool(self.input_ids) and isinstance(self.input_ids[0], list)

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The items, as text or as ids."""
        items: Any = self.text if self.text is not None else self.input_ids
        return items if self.is_batch else [items]


@dataclass(frozen=True)
class EngineLimits:
    """What a running engine can take."""

    context_length: int
    kv_cache_tokens: int
    vocab_size: int
    dp_size: int
    has_tokenizer: bool
    routed_experts: bool


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
    sample_group: str


def parse_generate_request(fields: dict[str, Any]) -> GenerateReqInput:
    """
    Raises:
        ValueError: a field is unknown, unsupported, of the wrong type or out of range; the message names it.
    """
    try:
        return GenerateReqInput.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part not in ("SamplingParamsInput", "int", "str"))
        reason = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{where}: {reason}" if where else reason) from None


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
            routed_experts_start_len=fields["routed_experts_start_len"],
            sample_group=rid if params.n > 1 else "",
        )
        for sample in range(params.n)
    ]


def check_prompt(input_ids: list[int], limits: EngineLimits) -> None:
    if not input_ids:
        raise ValueError("the prompt is empty: must have at least one token")
    if len(input_ids) > limits.context_length:
        raise ValueError(
            f"the prompt has {len(input_ids)} tokens: must have at most {limits.context_length} (context_length)"
        )
    ids = np.asarray(input_ids)
    if ids.min() < 0 or ids.max() >= limits.vocab_size:
        bad = int(ids[(ids < 0) | (ids >= limits.vocab_size)][0])
        raise ValueError(f"input_ids: {bad} is no token, ids lie in 0 .. {limits.vocab_size - 1}")


def resolve_max_new_tokens(params: SamplingParamsInput, num_prompt: int, limits: EngineLimits) -> int:
    """What was asked for, if it fits; the default is cut to what fits."""
    room = limits.context_length - num_prompt
    # The last token is sampled and never becomes an input, so it needs no KV slot.
    kv_room = limits.kv_cache_tokens - num_prompt + 1
    if kv_room < 1:
        raise ValueError(
            f"the prompt has {num_prompt} tokens: must have at most {limits.kv_cache_tokens} (kv_cache_tokens)"
        )
    if params.max_new_tokens is None:
        return max(min(DEFAULT_MAX_NEW_TOKENS, room, kv_room), params.min_new_tokens)
    if params.max_new_tokens > room:
        raise ValueError(
            f"max_new_tokens={params.max_new_tokens} with {num_prompt} prompt tokens: together they must be at most "
            f"{limits.context_length} (context_length)"
        )
    if params.max_new_tokens > kv_room:
        raise ValueError(
            f"max_new_tokens={params.max_new_tokens} with {num_prompt} prompt tokens: together they must be at most "
            f"{limits.kv_cache_tokens + 1} (kv_cache_tokens + 1)"
        )
    return params.max_new_tokens


def check_sampling(params: SamplingParamsInput, limits: EngineLimits) -> None:
    for name, ids in (("logit_bias", params.logit_bias or {}), ("stop_token_ids", params.stop_token_ids or [])):
        bad = [token for token in ids if not 0 <= token < limits.vocab_size]
        if bad:
            raise ValueError(f"{name}: {bad[0]} is no token, ids lie in 0 .. {limits.vocab_size - 1}")
    if params.stop_strings and not limits.has_tokenizer:
        raise ValueError("stop: the checkpoint has no tokenizer; give stop_token_ids")


def check_logprobs(fields: dict[str, Any], num_prompt: int, limits: EngineLimits) -> None:
    start, top = fields["logprob_start_len"], fields["top_logprobs_num"]
    if not -1 <= start <= num_prompt:
        raise ValueError(f"logprob_start_len={start}: must lie in -1 (output only) .. {num_prompt} (prompt tokens)")
    most = min(MAX_TOP_LOGPROBS, limits.vocab_size)
    if not 0 <= top <= most:
        raise ValueError(f"top_logprobs_num={top}: must lie in 0 .. {most}")


def check_routed_experts(fields: dict[str, Any], num_prompt: int, limits: EngineLimits) -> None:
    """Only for those who opted in; the wording is what clients of the field look for."""
    if not fields["return_routed_experts"]:
        return
    start = fields["routed_experts_start_len"]
    if not limits.routed_experts:
        raise ValueError(
            "return_routed_experts: the engine was started without routing; start it with "
            "--enable-return-routed-experts (enable_return_routed_experts=True)"
        )
    if start < 0:
        raise ValueError(f"routed_experts_start_len={start} is lower than 0: must lie in 0 .. {num_prompt}")
    if start > num_prompt:
        raise ValueError(
            f"routed_experts_start_len={start} is higher than the number of input tokens ({num_prompt}): must lie in "
            f"0 .. {num_prompt}"
        )


def make_sampling_params(params: SamplingParamsInput, max_new_tokens: int, seed: int) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        min_new_tokens=params.min_new_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        repetition_penalty=params.repetition_penalty,
        stop=params.stop_strings,
        stop_token_ids=tuple(params.stop_token_ids or ()),
        ignore_eos=params.ignore_eos,
        skip_special_tokens=params.skip_special_tokens,
        no_stop_trim=params.no_stop_trim,
        logit_bias=params.logit_bias or {},
        sampling_seed=seed,
    )
