"""vLLM's `/inference/v1/generate`: token ids in, token ids out."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from ...frontend.sampling_params import MAX_SAMPLES
from ...validation import dialect_fields
from ...validation.field_error import FieldError
from ...validation.request_model import Items, Name, Number, Real, RequestModel
from ...validation.token_ids import NESTED_SCHEMA, Ids, as_ids
from ..openai.protocol import MAX_BAD_WORDS, MAX_PROMPT_LOGPROBS, MAX_TOP_LOGPROBS, StreamOptions
from ..openai.structured_outputs import StructuredOutputsField

# vLLM's names of a sample's parameters, and the native ones.
RENAMED = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "seed": "sampling_seed"}
SAME = (
    *("n", "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "stop"),
    *("stop_token_ids", "ignore_eos", "logit_bias", "allowed_token_ids"),
)


class VllmSamplingParams(RequestModel):
    """Ranges are those of the native API, which refuses what is out of them."""

    neutral_fields = dialect_fields.VLLM_GENERATE_SAMPLING
    ignored_fields = dialect_fields.VLLM_SAMPLING_IGNORED

    n: Number = Field(1, ge=1, le=MAX_SAMPLES)
    max_tokens: Number | None = None
    min_tokens: Number = 0
    temperature: Real = 1.0
    top_p: Real = 1.0
    top_k: Number = 0
    min_p: Real = 0.0
    presence_penalty: Real = 0.0
    frequency_penalty: Real = 0.0
    repetition_penalty: Real = 1.0
    seed: Number | None = None
    stop: str | Items[str] | None = None
    stop_token_ids: Items[Number] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logit_bias: dict[Number, Real] | None = None
    allowed_token_ids: Items[Number] | None = None
    bad_words: Annotated[Items[str], Field(max_length=MAX_BAD_WORDS)] | None = None
    logprobs: Annotated[Number, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    prompt_logprobs: Annotated[Number, Field(ge=0, le=MAX_PROMPT_LOGPROBS)] | None = None
    routed_experts_prompt_start: Annotated[Number, Field(ge=0)] = 0
    structured_outputs: StructuredOutputsField | None = None

    def native(self, max_new_tokens: int) -> dict[str, Any]:
        """As `sampling_params` of a `GenerateReqInput`."""
        params = {name: getattr(self, name) for name in SAME} | {RENAMED[name]: getattr(self, name) for name in RENAMED}
        params |= {"max_new_tokens": max_new_tokens, "no_stop_trim": self.include_stop_str_in_output}
        params["top_k"] = self.top_k or None
        if self.structured_outputs is not None:
            params |= self.structured_outputs.grammar
        return {name: value for name, value in params.items() if value is not None}


def parse_token_ids(value: Any) -> Ids:
    return as_ids(value, "token_ids")


class TokenRequest(RequestModel):
    neutral_fields = dialect_fields.VLLM_GENERATE
    ignored_fields = dialect_fields.VLLM_CONTROL_IGNORED
    id_fields = ("token_ids",)

    token_ids: Annotated[Any, BeforeValidator(parse_token_ids), WithJsonSchema(NESTED_SCHEMA["anyOf"][0])]
    sampling_params: VllmSamplingParams = VllmSamplingParams()
    request_id: Name | None = None
    cache_salt: Name | None = None
    priority: Number = 0
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stream:
            raise FieldError("stream: must be false here; /generate and /v1/completions stream", "stream")
        return self

    def names(self) -> dict[str, str]:
        """What the fields of a `GenerateReqInput` are called here, for its refusals."""
        names = {native: f"sampling_params.{name}" for name, native in RENAMED.items()}
        names |= {name: f"sampling_params.{name}" for name in SAME}
        if self.sampling_params.structured_outputs is not None:
            own = self.sampling_params.structured_outputs.names
            names |= {native: f"sampling_params.{name}" for native, name in own.items()}
        return names | {
            "input_ids": "token_ids",
            "rid": "request_id",
            "top_k": "sampling_params.top_k",
            "bad_words": "sampling_params.bad_words",
            "top_logprobs_num": "sampling_params.logprobs",
            "routed_experts_start_len": "sampling_params.routed_experts_prompt_start",
        }

    def native(self, max_new_tokens: int, *, has_routes: bool) -> dict[str, Any]:
        """The fields of a `GenerateReqInput`. Where the engine has routes every answer has them, as in vLLM."""
        params = self.sampling_params
        routes = {
            "return_routed_experts": True,
            "routed_experts_format": "npy",
            "routed_experts_start_len": params.routed_experts_prompt_start,
        }
        return {
            "input_ids": self.token_ids,
            "sampling_params": params.native(max_new_tokens),
            "rid": self.request_id,
            "cache_salt": self.cache_salt,
            "priority": self.priority,
            "return_logprob": params.logprobs is not None or params.prompt_logprobs is not None,
            "top_logprobs_num": max(params.logprobs or 0, params.prompt_logprobs or 0),
            "logprob_start_len": -1 if params.prompt_logprobs is None else 0,
            "return_text_in_logprobs": True,
            **(routes if has_routes else {}),
        }
