"""`trl vllm-serve`: prompts or chats in one batch, and ids with their log-probabilities back."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BeforeValidator, Field, WithJsonSchema
from starlette.responses import Response

from ...frontend.answer import GenerationError
from ...frontend.chat_template import ChatTemplate
from ...frontend.generate_request import CHAR_COST_US, parse_generate_request
from ...frontend.request_preparation import PreparedRequest
from ...frontend.tokenizer_manager import TokenizerManager
from ...validation import dialect_fields
from ...validation.field_error import FieldError
from ...validation.request_model import Items, Number, PerPrompt, Real, RequestModel, validate
from ..bodies import CLIENT_GONE, BodyReader
from ..bounded_body import release_body
from ..native import first_answer
from ..openai import extensions, serving
from ..openai.chat_prompt import render_ids
from ..openai.messages import ChatMessage
from ..openai.protocol import MAX_TOP_LOGPROBS, PROMPT_SCHEMA, TEMPLATE_FIELDS, parse_prompt
from ..openai.tools import MAX_TOOLS, Tool
from ..responses import ClientGoneError, encode_json, unless_disconnected
from .token_protocol import RENAMED, VllmSamplingParams

# Of vLLM's parameters.
NOT_ANSWERED = ("prompt_logprobs", "routed_experts_prompt_start")


class TrlRequest(RequestModel):
    neutral_fields = dialect_fields.TRL_GENERATE

    n: Number = 1
    repetition_penalty: Real = 1.0
    temperature: Real = 1.0
    top_p: Real = 1.0
    top_k: Number = -1
    min_p: Real = 0.0
    max_tokens: Number = 16
    logprobs: Annotated[Number, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = 0
    structured_outputs_regex: str | None = None
    # Overrides what stands above; of vLLM's sampling parameters.
    generation_kwargs: dict[str, Any] = Field({})

    def params(self) -> VllmSamplingParams:
        for name in NOT_ANSWERED:
            if self.generation_kwargs.get(name):
                field = f"generation_kwargs.{name}"
                raise FieldError(
                    f"{field}: has no place in the answer here, has one in /inference/v1/generate's", field
                )
        names = VllmSamplingParams.model_fields.keys() & TrlRequest.model_fields.keys()
        own = {name: getattr(self, name) for name in names}
        try:
            return validate(VllmSamplingParams, own | self.generation_kwargs)
        except FieldError as error:
            inside = error.field in self.generation_kwargs
            raise error.inside(["generation_kwargs"]) if inside else error from None

    def names(self, prompt: str) -> dict[str, str]:
        """What the fields of a `GenerateReqInput` are called here, for its refusals."""
        names = {native: name for name, native in RENAMED.items()}
        names |= {"top_logprobs_num": "logprobs", "no_stop_trim": "include_stop_str_in_output"}
        inside = {name: f"generation_kwargs.{name}" for name in self.generation_kwargs}
        names = inside | {native: inside.get(name, name) for native, name in names.items()}
        return names | {"input_ids": prompt, "text": prompt, "regex": "structured_outputs_regex"}


def parse_prompts(value: Any) -> Any:
    return parse_prompt(value)


class TrlGenerateRequest(TrlRequest):
    id_fields = ("prompts",)

    prompts: Annotated[Any, BeforeValidator(parse_prompts), WithJsonSchema(PROMPT_SCHEMA)]


class TrlChatRequest(TrlRequest):
    messages: PerPrompt[Items[ChatMessage]]
    tools: Annotated[Items[Tool], Field(max_length=MAX_TOOLS)] | None = None
    chat_template_kwargs: dict[str, Any] = Field({})


class TrlServing:
    def __init__(self, manager: TokenizerManager, template: ChatTemplate | None) -> None:
        self._manager = manager
        self._template = template

    async def generate(self, body: TrlGenerateRequest, http: Request) -> Response:
        is_text = isinstance(body.prompts, list) and bool(body.prompts) and isinstance(body.prompts[0], str)
        return await self._answer(body, {"text" if is_text else "input_ids": body.prompts}, body.names("prompts"), http)

    async def chat(self, body: TrlChatRequest, http: Request) -> Response:
        cost_us = CHAR_COST_US * http.state.body_bytes
        ids = await self._manager.work_threads.run(cost_us, partial(self._rendered, body))
        return await self._answer(body, {"input_ids": ids}, body.names("messages"), http)

    def _rendered(self, body: TrlChatRequest) -> list[list[int]]:
        assert self._manager.limits is not None
        reserved = TEMPLATE_FIELDS & body.chat_template_kwargs.keys()
        if reserved:
            raise FieldError(f"chat_template_kwargs: must not have {min(reserved)!r}", "chat_template_kwargs")
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or []]
        most = self._manager.limits.context_length
        fields = {**({"tools": tools} if tools else {}), **body.chat_template_kwargs}
        return [
            render_ids(
                self._template,
                self._manager.text,
                chat,
                most,
                # What ends with the assistant is gone on with.
                add_generation_prompt=not (chat and chat[-1].role == "assistant"),
                continue_final_message=bool(chat and chat[-1].role == "assistant"),
                **fields,
            )
            for chat in body.messages
        ]

    async def _answer(self, body: TrlRequest, prompt: dict[str, Any], names: dict[str, str], http: Request) -> Response:
        params = body.params()
        native = params.native(params.max_tokens if params.max_tokens is not None else 16)
        if body.structured_outputs_regex is not None:
            native["regex"] = body.structured_outputs_regex
        fields = {
            **prompt,
            "sampling_params": native,
            "return_logprob": params.logprobs is not None,
            "top_logprobs_num": params.logprobs or 0,
        }
        try:
            if params.bad_words:
                extensions.ban(params.bad_words, native, self._manager.text)
            request = parse_generate_request(fields)
            prepared = await unless_disconnected(http, self._manager.prepare(request), PreparedRequest.release)
            release_body(http)
            try:
                answers = serving.as_list(await unless_disconnected(http, first_answer(self._manager, prepared)))
            finally:
                prepared.release()
        except ClientGoneError:
            return Response(status_code=CLIENT_GONE)
        except FieldError as error:
            raise error.renamed(names) from None
        content = await asyncio.to_thread(batch_answer, prepared, answers, params.n)
        return await encode_json(content, large=True, on_sent=prepared.delivered)


def batch_answer(prepared: PreparedRequest, answers: list[dict[str, Any]], num_samples: int) -> dict[str, Any]:
    """Ids of each prompt and of each completion; log-probabilities in falling order, the sampled token's among them.

    Raises:
        GenerationError: the engine failed one, and there is no place to say so beside the others.
    """
    logprobs, ids = [], []
    for answer in answers:
        failure = serving.failure_of(answer)
        if failure:
            raise GenerationError(failure["error"]["message"])
        meta = answer["meta_info"]
        tops = meta.get("output_top_logprobs", [])
        ordered = []
        for position, own in enumerate(meta.get("output_token_logprobs", [])):
            best = {token: value for value, token, _ in (tops[position] or [])} if position < len(tops) else {}
            best[own[1]] = own[0]
            ordered.append(sorted(best.items(), key=lambda pair: pair[1], reverse=True))
        logprobs.append([[value for _, value in pairs] for pairs in ordered])
        ids.append([[token for token, _ in pairs] for pairs in ordered])
    has_logprobs = bool(answers) and "output_token_logprobs" in answers[0]["meta_info"]
    return {
        "prompt_ids": [sample.input_ids.tolist() for sample in prepared.samples[::num_samples]],
        "completion_ids": [answer["output_ids"] for answer in answers],
        "logprobs": logprobs if has_logprobs else None,
        "logprob_token_ids": ids if has_logprobs else None,
    }


def trl_router(manager: TokenizerManager, bodies: BodyReader, template: ChatTemplate | None) -> APIRouter:
    router = APIRouter(route_class=bodies.route_class(), include_in_schema=False)
    trl = TrlServing(manager, template)

    # `/generate` without the slash is the native API's.
    @router.post("/generate/")
    async def generate(body: TrlGenerateRequest, http: Request) -> Response:
        return await trl.generate(body, http)

    @router.post("/chat")
    @router.post("/chat/")
    async def chat(body: TrlChatRequest, http: Request) -> Response:
        return await trl.chat(body, http)

    return router
