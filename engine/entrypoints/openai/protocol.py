"""OpenAI's completions and chat completions as requests, with the extensions of the field; checked field by field."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from ...generate_request import MAX_NAME_CHARS, Name, check_utf8
from ...sampling_input import MAX_SAMPLES, drop_dialect_fields

MAX_TOP_LOGPROBS = 20

# Change the result and are not implemented: legal at the value that means "off", or null.
NEUTRAL_FIELDS: dict[str, Any] = {
    "audio": None,
    "best_of": 1,
    "function_call": "none",
    "functions": [],
    "modalities": ["text"],
    "prediction": None,
    "reasoning_effort": None,
    "response_format": {"type": "text"},
    "suffix": "",
    "tools": [],
    "verbosity": None,
    "web_search_options": None,
    "lora_path": None,
    "regex": None,
    "ebnf": None,
    "json_schema": None,
    "return_hidden_states": False,
}
# Change nothing in the result.
IGNORED_FIELDS = (
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "separate_reasoning",
    "service_tier",
    "store",
    "stream_reasoning",
    "tool_choice",
    "user",
)


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    continuous_usage_stats: Literal[False] = False
    include_obfuscation: bool = False


class OpenAIRequest(BaseModel):
    """What both endpoints share."""

    model_config = ConfigDict(extra="forbid")

    # Stands in every answer.
    model: Annotated[str, Field(max_length=MAX_NAME_CHARS), AfterValidator(check_utf8)] = ""
    n: int = Field(1, ge=1, le=MAX_SAMPLES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = None
    top_p: float | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    # Extensions of the field.
    top_k: int | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    rid: Name | None = None
    session_id: Name | None = None
    priority: int = 0
    extra_key: Name | None = None
    routed_dp_rank: int | None = None
    return_routed_experts: bool = False
    routed_experts_start_len: int | list[int] = 0
    routed_experts_format: Literal["int32", "compact"] = "int32"
    routed_experts_delivery: Literal["inline", "reference"] = "inline"

    @model_validator(mode="before")
    @classmethod
    def _drop_dialect_fields(cls, data: Any) -> Any:
        return drop_dialect_fields(data, NEUTRAL_FIELDS, IGNORED_FIELDS)

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: needs stream=true")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def generate_fields(self, max_new_tokens: int | None) -> dict[str, Any]:
        """The fields of a `GenerateReqInput`, without its prompt."""
        params = {
            "n": self.n,
            "max_new_tokens": max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stop": self.stop,
            "sampling_seed": self.seed,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": self.logit_bias,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "min_new_tokens": self.min_tokens,
            "repetition_penalty": self.repetition_penalty,
            "stop_token_ids": self.stop_token_ids,
        }
        return {
            # Null means the default, as everywhere in this API.
            "sampling_params": {name: value for name, value in params.items() if value is not None}
            | {
                "ignore_eos": self.ignore_eos,
                "skip_special_tokens": self.skip_special_tokens,
                "no_stop_trim": self.no_stop_trim,
            },
            "stream": self.stream,
            "rid": self.rid,
            "session_id": self.session_id,
            "priority": self.priority,
            "extra_key": self.extra_key,
            "routed_dp_rank": self.routed_dp_rank,
            "return_routed_experts": self.return_routed_experts,
            "routed_experts_start_len": self.routed_experts_start_len,
            "routed_experts_format": self.routed_experts_format,
            "routed_experts_delivery": self.routed_experts_delivery,
            "return_text_in_logprobs": True,
        }


class CompletionRequest(OpenAIRequest):
    """`/v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message; what a template needs beyond role and content is passed on to it."""

    model_config = ConfigDict(extra="allow")

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[TextPart] | None = None

    def for_template(self) -> dict[str, Any]:
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        return {**(self.model_extra or {}), "role": self.role, "content": content or ""}


class ChatCompletionRequest(OpenAIRequest):
    """`/v1/chat/completions`. With `input_ids` these are the prompt, token in and token out, and no template is used."""

    messages: list[ChatMessage] = []
    input_ids: list[int] | None = None
    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    chat_template_kwargs: dict[str, Any] = {}
    add_generation_prompt: bool = True
    continue_final_message: Literal[False] = False
    return_meta_info: bool = False

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if not self.messages and self.input_ids is None:
            raise ValueError("messages: must have at least one message, or input_ids must be given")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs=true")
        reserved = {"messages", "add_generation_prompt"} & self.chat_template_kwargs.keys()
        if reserved:
            raise ValueError(f"chat_template_kwargs: must not have {sorted(reserved)[0]!r}")
        return self
