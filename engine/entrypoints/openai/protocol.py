"""OpenAI's completions and chat completions as requests, with the extensions of the field; checked field by field."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from ...frontend.generate_request import GenerateReqInput, StartLen
from ...frontend.sampling_params import MAX_SAMPLES, SamplingParamsInput, check_size
from ...validation import dialect_fields
from ...validation.field_error import FieldError
from ...validation.request_model import (
    MAX_NAME_CHARS,
    Items,
    Name,
    Number,
    PerPrompt,
    Real,
    RequestModel,
    check_utf8,
)
from ...validation.token_ids import MAX_PROMPTS, NESTED_SCHEMA, Ids, Prompts, as_ids, as_prompts

MAX_TOP_LOGPROBS = 20


class StreamOptions(RequestModel):
    include_usage: bool = False
    continuous_usage_stats: Literal[False] = False
    # Padding against who watches the sizes of packets.
    include_obfuscation: Literal[False] = False


class OpenAIRequest(RequestModel):
    """What both endpoints share."""

    neutral_fields = dialect_fields.OPENAI
    ignored_fields = dialect_fields.OPENAI_IGNORED

    # Stands in every answer.
    model: Annotated[str, Field(max_length=MAX_NAME_CHARS), AfterValidator(check_utf8)] = ""
    n: Number = Field(1, ge=1, le=MAX_SAMPLES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[Number, Field(ge=0)] | None = None
    temperature: Real | None = None
    top_p: Real | None = None
    stop: str | Items[str] | None = None
    seed: Number | None = None
    presence_penalty: Real | None = None
    frequency_penalty: Real | None = None
    logit_bias: Annotated[dict[int, Real], BeforeValidator(check_size)] | None = None
    # Extensions of the field.
    top_k: Number | None = None
    min_p: Real | None = None
    min_tokens: Number | None = None
    repetition_penalty: Real | None = None
    stop_token_ids: Items[Number] | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    rid: Name | None = None
    session_id: Name | None = None
    priority: Number = 0
    extra_key: Name | None = None
    cache_salt: Name | None = None
    routed_dp_rank: Number | None = None
    data_parallel_rank: Number | None = None
    return_routed_experts: bool = False
    routed_experts_start_len: StartLen | PerPrompt[StartLen] = 0
    routed_experts_format: Literal["int32", "compact"] = "int32"
    routed_experts_delivery: Literal["inline", "reference"] = "inline"

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options: needs stream=true", "stream_options", mentions=("stream",))
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def names(self) -> dict[str, str]:
        """What the fields of a `GenerateReqInput` are called here, for its refusals."""
        return {"sampling_seed": "seed", "max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}

    def generate_fields(self, max_new_tokens: int | None) -> dict[str, Any]:
        """The fields of a `GenerateReqInput`, without its prompt."""
        params = {name: getattr(self, name) for name in SAMPLING_NAMES}
        params |= {
            "max_new_tokens": max_new_tokens,
            "min_new_tokens": self.min_tokens,
            "sampling_seed": self.seed,
        }
        return {
            # Null means the default, as everywhere in this API.
            "sampling_params": {name: value for name, value in params.items() if value is not None},
            **{name: getattr(self, name) for name in GENERATE_NAMES},
            "return_text_in_logprobs": True,
        }


# Fields of both endpoints that the native API has under the same name.
SAMPLING_NAMES = OpenAIRequest.model_fields.keys() & SamplingParamsInput.model_fields.keys()
GENERATE_NAMES = OpenAIRequest.model_fields.keys() & GenerateReqInput.model_fields.keys()


def parse_prompt(value: Any) -> str | list[str] | Prompts:
    """One branch is tried: the one that the first item asks for."""
    if isinstance(value, str):
        return value
    if not (isinstance(value, list) and value and isinstance(value[0], str)):
        return as_prompts(value, "prompt")
    if len(value) > MAX_PROMPTS:
        raise FieldError(f"prompt: must be at most {MAX_PROMPTS} prompts", "prompt")
    odd = next((index for index, item in enumerate(value) if not isinstance(item, str)), None)
    if odd is not None:
        raise FieldError(f"prompt.{odd}: must be text, as the items before it", "prompt")
    return value


PROMPT_SCHEMA = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, *NESTED_SCHEMA["anyOf"]],
}


class CompletionRequest(OpenAIRequest):
    """`/v1/completions`."""

    id_fields = ("prompt",)

    prompt: Annotated[Any, BeforeValidator(parse_prompt), WithJsonSchema(PROMPT_SCHEMA)]
    echo: bool = False
    logprobs: Annotated[Number, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @property
    def is_text(self) -> bool:
        return isinstance(self.prompt, str) or (
            isinstance(self.prompt, list) and bool(self.prompt) and isinstance(self.prompt[0], str)
        )

    def names(self) -> dict[str, str]:
        prompt = {"text": "prompt", "input_ids": "prompt"}
        return {**super().names(), **prompt, "top_logprobs_num": "logprobs", "logprob_start_len": "echo"}


class TextPart(RequestModel):
    type: Literal["text"]
    text: str


class ChatMessage(RequestModel):
    """One message; what a template needs beyond role and content is passed on to it."""

    model_config = ConfigDict(extra="allow")

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | Items[TextPart] | None = None

    def for_template(self) -> dict[str, Any]:
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        return {**(self.model_extra or {}), "role": self.role, "content": content or ""}


def parse_ids_of_one(value: Any) -> Ids:
    return as_ids(value, "input_ids")


class ChatCompletionRequest(OpenAIRequest):
    """`/v1/chat/completions`. With `input_ids` these are the prompt, token in and token out, and no template is used."""

    id_fields = ("input_ids",)

    messages: Items[ChatMessage] = Field([])
    input_ids: Annotated[Any, BeforeValidator(parse_ids_of_one), WithJsonSchema(NESTED_SCHEMA["anyOf"][0])] = None
    max_completion_tokens: Annotated[Number, Field(ge=0)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[Number, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    chat_template_kwargs: dict[str, Any] = Field({})
    add_generation_prompt: bool = True
    continue_final_message: Literal[False] = False
    return_meta_info: bool = False

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if not self.messages and self.input_ids is None:
            raise FieldError("messages: must have at least one message, or input_ids must be given", "messages")
        if self.top_logprobs is not None and not self.logprobs:
            raise FieldError("top_logprobs: needs logprobs=true", "top_logprobs")
        reserved = {"messages", "add_generation_prompt"} & self.chat_template_kwargs.keys()
        if reserved:
            raise FieldError(f"chat_template_kwargs: must not have {min(reserved)!r}", "chat_template_kwargs")
        return self

    def names(self) -> dict[str, str]:
        asked = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        prompt = "messages" if self.input_ids is None else "input_ids"
        return {
            **super().names(),
            "max_new_tokens": asked,
            "text": prompt,
            "input_ids": prompt,
            "top_logprobs_num": "top_logprobs",
        }
