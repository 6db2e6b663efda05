"""OpenAI's completions and chat completions as requests, with the extensions of the field; checked field by field."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from ...chat_formats.json_array import array_schema
from ...frontend.generate_request import BootstrapHost, BootstrapNumber, GenerateReqInput, StartLen
from ...frontend.sampling_params import GRAMMARS, MAX_SAMPLES, SamplingParamsInput, check_size
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
from .messages import ChatMessage
from .response_format import ResponseFormat
from .structured_outputs import StructuredOutputsField
from .tools import MAX_TOOLS, NamedTool, Tool, ToolChoice

MAX_TOP_LOGPROBS = 20
MAX_PROMPT_LOGPROBS = 100
MAX_BAD_WORDS = 64
# Fields of a chat that its template's variables cannot be.
TEMPLATE_FIELDS = {"messages", "add_generation_prompt", "tools", "continue_final_message", "split_special_tokens"}


class StreamOptions(RequestModel):
    include_usage: bool = False
    # Every chunk has the usage so far.
    continuous_usage_stats: bool = False
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
    # Null: as the server was started for a chat, false for a prompt.
    split_special_tokens: bool | None = None
    routed_dp_rank: Number | None = None
    data_parallel_rank: Number | None = None
    bootstrap_host: BootstrapHost = None
    bootstrap_port: BootstrapNumber = None
    bootstrap_room: BootstrapNumber = None
    return_routed_experts: bool = False
    routed_experts_start_len: StartLen | PerPrompt[StartLen] = 0
    routed_experts_format: Literal["int32", "compact", "npy"] = "int32"
    routed_experts_delivery: Literal["inline", "reference"] = "inline"
    return_router_weights: bool = False
    # vLLM's names and fields. The first two are `rid` and `no_stop_trim`.
    request_id: Name | None = None
    include_stop_str_in_output: bool = False
    allowed_token_ids: Items[Number] | None = None
    bad_words: Annotated[Items[str], Field(max_length=MAX_BAD_WORDS)] | None = None
    prompt_logprobs: Annotated[Number, Field(ge=0, le=MAX_PROMPT_LOGPROBS)] | None = None
    return_token_ids: bool = False
    # Log-probabilities name a token `token_id:7`, not by its text.
    return_tokens_as_token_ids: bool = False
    # Given, each choice has its routes in vLLM's form.
    routed_experts_prompt_start: Annotated[Number, Field(ge=0)] | None = None
    json_schema: str | dict[str, Any] | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    # vLLM's, of one of the four above.
    structured_outputs: StructuredOutputsField | None = None

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options: needs stream=true", "stream_options", mentions=("stream",))
        if self.request_id is not None and self.rid not in (None, self.request_id):
            raise FieldError("request_id: must be that of rid, or absent", "request_id", mentions=("rid",))
        if self.prompt_logprobs is not None and self.stream:
            raise FieldError("prompt_logprobs: needs stream=false", "prompt_logprobs", mentions=("stream",))
        self._check_routes()
        self._check_grammars()
        return self

    def _check_grammars(self) -> None:
        """The engine sees to it that there is one of its own."""
        given = [name for name in GRAMMARS if getattr(self, name) is not None]
        if self.structured_outputs is not None:
            given.insert(0, "structured_outputs")
        if self.response_format is not None and self.response_format.grammar:
            given.insert(0, "response_format")
        if len(given) > 1 and given[0] not in GRAMMARS:
            name, other = given[:2]
            raise FieldError(f"{name}: must be absent beside {other}", name, mentions=(other,))

    def _check_routes(self) -> None:
        name = "routed_experts_prompt_start"
        if self.routed_experts_prompt_start is None:
            return
        if self.stream:
            raise FieldError(f"{name}: needs stream=false", name, mentions=("stream",))
        for other in ("return_routed_experts", "return_router_weights"):
            if getattr(self, other):
                raise FieldError(f"{name}: must be absent beside {other}", name)

    @property
    def has_grammar(self) -> bool:
        """Whether the caller bounds what the text may be."""
        by_format = self.response_format is not None and bool(self.response_format.grammar)
        return by_format or any(getattr(self, name) is not None for name in (*GRAMMARS, "structured_outputs"))

    @property
    def has_extras(self) -> bool:
        """Whether an answer has what takes long to write."""
        return self.return_token_ids or self.prompt_logprobs is not None

    @property
    def has_continuous_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def names(self) -> dict[str, str]:
        """What the fields of a `GenerateReqInput` are called here, for its refusals."""
        names = {"sampling_seed": "seed", "max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
        if self.response_format is not None:
            names |= dict.fromkeys(self.response_format.grammar, "response_format")
        if self.structured_outputs is not None:
            names |= self.structured_outputs.names
        if self.request_id is not None:
            names["rid"] = "request_id"
        if self.routed_experts_prompt_start is not None:
            name = "routed_experts_prompt_start"
            names |= {"routed_experts_start_len": name, "return_routed_experts": name}
        return names

    def logprob_fields(self, *, asked: bool, num_top: int, from_prompt: bool = False) -> dict[str, Any]:
        """Of a `GenerateReqInput`, for those of the output and of the prompt; the engine has one number for both."""
        of_prompt = self.prompt_logprobs is not None
        return {
            "return_logprob": asked or of_prompt,
            "top_logprobs_num": max(num_top, self.prompt_logprobs or 0),
            "logprob_start_len": 0 if from_prompt or of_prompt else -1,
        }

    def generate_fields(self, max_new_tokens: int | None) -> dict[str, Any]:
        """The fields of a `GenerateReqInput`, without its prompt."""
        params = {name: getattr(self, name) for name in SAMPLING_NAMES}
        params |= {
            "max_new_tokens": max_new_tokens,
            "min_new_tokens": self.min_tokens,
            "sampling_seed": self.seed,
            "no_stop_trim": self.no_stop_trim or self.include_stop_str_in_output,
            # In vLLM 0 is off, too.
            "top_k": self.top_k or None,
            **(self.response_format.grammar if self.response_format is not None else {}),
            **(self.structured_outputs.grammar if self.structured_outputs is not None else {}),
        }
        routes = {}
        if self.routed_experts_prompt_start is not None:
            start = {"routed_experts_start_len": self.routed_experts_prompt_start}
            routes = {"return_routed_experts": True, "routed_experts_format": "npy", **start}
        return {
            # Null means the default, as everywhere in this API.
            "sampling_params": {name: value for name, value in params.items() if value is not None},
            **{name: getattr(self, name) for name in GENERATE_NAMES},
            "rid": self.rid or self.request_id,
            **routes,
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
    neutral_fields = dialect_fields.COMPLETION
    ignored_fields = dialect_fields.COMPLETION_IGNORED

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


def parse_ids_of_one(value: Any) -> Ids:
    return as_ids(value, "input_ids")


class ChatCompletionRequest(OpenAIRequest):
    """`/v1/chat/completions`. With `input_ids` these are the prompt, token in and token out, and no template is used."""

    id_fields = ("input_ids",)
    neutral_fields = dialect_fields.CHAT

    messages: Items[ChatMessage] = Field([])
    input_ids: Annotated[Any, BeforeValidator(parse_ids_of_one), WithJsonSchema(NESTED_SCHEMA["anyOf"][0])] = None
    max_completion_tokens: Annotated[Number, Field(ge=0)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[Number, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    chat_template_kwargs: dict[str, Any] = Field({})
    add_generation_prompt: bool = True
    # The last message is not ended: the answer goes on with it.
    continue_final_message: bool = False
    tools: Annotated[Items[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    separate_reasoning: bool = True
    stream_reasoning: bool = True
    return_meta_info: bool = False

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if not self.messages and self.input_ids is None:
            raise FieldError("messages: must have at least one message, or input_ids must be given", "messages")
        if self.top_logprobs and not self.logprobs:
            raise FieldError("top_logprobs: needs logprobs=true", "top_logprobs")
        self._check_tools()
        if self.continue_final_message:
            self._check_continuation()
        reserved = TEMPLATE_FIELDS & self.chat_template_kwargs.keys()
        if reserved:
            raise FieldError(f"chat_template_kwargs: must not have {min(reserved)!r}", "chat_template_kwargs")
        return self

    def _check_continuation(self) -> None:
        name, other = "continue_final_message", "add_generation_prompt"
        if not self.messages or self.messages[-1].role != "assistant":
            raise FieldError(f"{name}: the last message must be of the role assistant", name)
        if other in self.model_fields_set and self.add_generation_prompt:
            raise FieldError(f"{name}: needs {other}=false", name, mentions=(other,))

    def _check_tools(self) -> None:
        if self.tool_choice in (None, "none", "auto"):
            return
        if not self.tools:
            raise FieldError("tool_choice: needs tools", "tool_choice", mentions=("tools",))
        if isinstance(self.tool_choice, NamedTool):
            names = [tool.function.name for tool in self.tools]
            if self.tool_choice.function.name not in names:
                raise FieldError(f"tool_choice: must name one of the tools, {', '.join(names)[:500]}", "tool_choice")
        if self.has_grammar:
            raise FieldError("tool_choice: must be 'auto' or 'none' beside another bound on the output", "tool_choice")

    @property
    def callable_tools(self) -> list[dict[str, Any]]:
        """As they were sent; none where none may be called."""
        if not self.tools or self.tool_choice == "none":
            return []
        return [tool.model_dump(exclude_none=True) for tool in self.tools]

    @property
    def must_call(self) -> bool:
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    def calls_schema(self) -> dict[str, Any]:
        """What an answer that must call is."""
        functions = [tool["function"] for tool in self.callable_tools]
        named = isinstance(self.tool_choice, NamedTool)
        if isinstance(self.tool_choice, NamedTool):
            functions = [one for one in functions if one["name"] == self.tool_choice.function.name][:1]
        try:
            return array_schema(functions, parallel=self.parallel_tool_calls and not named)
        except ValueError as error:
            raise FieldError(f"tools: {error}", "tools") from None

    def names(self) -> dict[str, str]:
        asked = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        prompt = "messages" if self.input_ids is None else "input_ids"
        return {
            **super().names(),
            "max_new_tokens": asked,
            "text": prompt,
            "input_ids": prompt,
            "top_logprobs_num": "top_logprobs",
            # Counted over the parts of all messages.
            "image_data": "image_url",
            **({"json_schema": "tools"} if self.must_call else {}),
        }
