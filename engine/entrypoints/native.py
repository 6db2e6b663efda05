"""The native API: `/generate` and what belongs to it."""

from __future__ import annotations

import json
import logging
from contextlib import aclosing
from functools import partial
from typing import Annotated, Any, Self

import msgspec
from fastapi import APIRouter, Request
from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator
from starlette.responses import Response

from ..frontend.chat_template import ChatTemplate
from ..frontend.cumulative_answer import cumulative
from ..frontend.generate_request import CHAR_COST_US, GenerateReqInput
from ..frontend.request_preparation import PreparedRequest
from ..frontend.text_codec import DECODE_COST_US, TextCodec
from ..frontend.tokenizer_manager import MAX_RID_CHARS, TokenizerManager
from ..io_struct import RoutedExpertsMeta
from ..routing.claims import ClaimError
from ..validation import dialect_fields
from ..validation.field_error import FieldError
from ..validation.request_model import MAX_NAME_CHARS, Items, PerPrompt, RequestModel, check_utf8
from ..validation.token_ids import NESTED_SCHEMA, Prompts, as_prompts
from .bodies import CLIENT_GONE, BodyReader
from .bounded_body import release_body
from .errors import RID_KEY, abort_reason, error_response
from .json_log import FIELDS
from .openai.chat_prompt import render_ids
from .openai.messages import ChatMessage
from .openai.protocol import TEMPLATE_FIELDS
from .openai.tools import MAX_TOOLS, Tool
from .responses import (
    ClientGoneError,
    EventStream,
    PiecewiseResponse,
    encode_json,
    only,
    unless_disconnected,
)

logger = logging.getLogger(__name__)

SESSION_HEADER = "X-SMG-Routing-Key"
# Tokens of a text that `/tokenize` takes at most, where the context is shorter.
MAX_TOKENIZED = 1 << 17
META_HEADER = "X-Routed-Experts-Meta"
# Clients and proxies refuse a response whose head is longer than some 8 to 16 KiB.
MAX_META_HEADER_CHARS = 6 << 10


class AbortRequestInput(RequestModel):
    """Requests whose rid starts with `rid`, or all. `abort_message` is what their finish reason says."""

    neutral_fields = dialect_fields.ABORT

    rid: Annotated[str, Field(max_length=MAX_RID_CHARS)] = ""
    abort_all: bool = False
    abort_message: Annotated[str, Field(max_length=MAX_NAME_CHARS), AfterValidator(check_utf8)] = ""


class TokenizeInput(RequestModel):
    neutral_fields = dialect_fields.TOKENIZE

    prompt: str | PerPrompt[str] | None = None
    add_special_tokens: bool = True
    # As in a chat, or in `/generate`.
    split_special_tokens: bool | None = None
    model: str | None = None
    # In place of a prompt: what a chat of them would be.
    messages: Items[ChatMessage] | None = None
    tools: Annotated[Items[Tool], Field(max_length=MAX_TOOLS)] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field({})

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt, messages: give exactly one of them")
        reserved = TEMPLATE_FIELDS & self.chat_template_kwargs.keys()
        if reserved:
            raise FieldError(f"chat_template_kwargs: must not have {min(reserved)!r}", "chat_template_kwargs")
        return self


def parse_tokens(value: Any) -> Prompts:
    return as_prompts(value, "tokens")


class DetokenizeInput(RequestModel):
    id_fields = ("tokens",)

    tokens: Annotated[Any, BeforeValidator(parse_tokens), WithJsonSchema(NESTED_SCHEMA)]
    skip_special_tokens: bool = True
    model: str | None = None


def meta_header(meta: RoutedExpertsMeta) -> str:
    """The envelope for a header, in ASCII. Without the weight versions where their names would make it longer than clients
    take; they stand in the answer as well."""
    fields = msgspec.to_builtins(meta)
    text = json.dumps(fields)
    return text if len(text) <= MAX_META_HEADER_CHARS else json.dumps({**fields, "weight_versions": []})


def session_key(http: Request) -> str | None:
    """A header has bytes; those of a name that is not ASCII are UTF-8, as in a body."""
    key = http.headers.get(SESSION_HEADER)
    if key is None:
        return None
    try:
        return key.encode("latin-1").decode()
    except UnicodeDecodeError:
        return key


def with_session(request: GenerateReqInput, http: Request) -> GenerateReqInput:
    """The header names the session where the body does not."""
    http.scope[RID_KEY] = request.rid
    key = session_key(http)
    if key is not None and not 1 <= len(key) <= MAX_NAME_CHARS:
        raise FieldError(f"{SESSION_HEADER}: must have 1 to {MAX_NAME_CHARS} characters", SESSION_HEADER)
    return request if key is None or request.affinity is not None else request.model_copy(update={"session_id": key})


async def first_answer(
    manager: TokenizerManager, request: GenerateReqInput | PreparedRequest
) -> dict[str, Any] | list[Any]:
    """The whole answer of a request without streaming."""
    async with aclosing(manager.generate(request, form="json")) as answers:  # type: ignore[type-var]
        return await anext(answers)


def is_large(prepared: PreparedRequest) -> bool:
    """Whether an answer may be, and so is encoded on a thread."""
    options = [sample.output_options for sample in prepared.samples]
    return any(one.return_routed_experts or one.return_logprob for one in options)


async def answer_generate(manager: TokenizerManager, request: GenerateReqInput, http: Request) -> Response:
    """What `/generate` answers.

    Raises:
        ValueError: the request does not fit the engine, and has no stream to say so in.
    """

    def refusal(error: Exception) -> dict[str, Any]:
        return refused_event(request, str(error))

    try:
        prepared = await unless_disconnected(http, manager.prepare(request), PreparedRequest.release)
    except ClientGoneError:
        return Response(status_code=CLIENT_GONE)
    except ValueError as error:
        if not request.stream:
            raise
        return EventStream(only(refusal(error)), refusal)
    finally:
        # Tokens have taken its place.
        release_body(http)
    if request.stream:
        events = cumulative(manager.generate(prepared, form="json"))
        return EventStream(events, refusal, on_end=prepared.release, on_sent=prepared.delivered)
    try:
        answer = await unless_disconnected(http, first_answer(manager, prepared))
    except ClientGoneError:
        return Response(status_code=CLIENT_GONE)
    finally:
        prepared.release()
    return await encode_json(answer, large=is_large(prepared), on_sent=prepared.delivered)


def native_router(manager: TokenizerManager, bodies: BodyReader, template: ChatTemplate | None = None) -> APIRouter:
    """Routes of the native API over `manager`."""
    router = APIRouter(route_class=bodies.route_class())

    @router.post("/generate")
    @router.put("/generate", include_in_schema=False)
    async def generate(body: GenerateReqInput, http: Request) -> Response:
        return await answer_generate(manager, with_session(body, http), http)

    @router.post("/abort_request")
    async def abort_request(body: AbortRequestInput) -> Response:
        await manager.abort_and_wait(body.rid, abort_all=body.abort_all, message=body.abort_message)
        return Response()

    @router.get("/routed_experts/{claim}")
    async def fetch_routed_experts(claim: str) -> Response:
        try:
            routed = await manager.queries.fetch_routed_experts(claim)
        except ClaimError as error:
            return error_response(str(error), 410)
        headers = {META_HEADER: meta_header(routed.meta)}
        return PiecewiseResponse(bytes(routed.frame), headers=headers, media_type="application/octet-stream")

    @router.post("/tokenize")
    @router.post("/v1/tokenize", include_in_schema=False)
    async def tokenize(body: TokenizeInput, http: Request) -> Response:
        assert manager.limits is not None
        if body.messages is not None:
            work = partial(tokenized_messages, body, manager.text, template, manager.limits.context_length)
            return json_bytes(await manager.work_threads.run(CHAR_COST_US * http.state.body_bytes, work))
        assert body.prompt is not None
        num_chars = len(body.prompt) if isinstance(body.prompt, str) else sum(map(len, body.prompt))
        work = partial(tokenized, body, manager.text, manager.limits.context_length)
        return json_bytes(await manager.work_threads.run(CHAR_COST_US * num_chars, work))

    @router.post("/detokenize")
    @router.post("/v1/detokenize", include_in_schema=False)
    async def detokenize(body: DetokenizeInput) -> Response:
        assert manager.limits is not None
        num_ids = sum(map(len, body.tokens)) if isinstance(body.tokens, list) else len(body.tokens)
        work = partial(detokenized, body, manager.text, manager.limits.vocab_size)
        return json_bytes(await manager.work_threads.run(DECODE_COST_US * num_ids, work))

    return router


def json_bytes(content: bytes) -> Response:
    return PiecewiseResponse(content, media_type="application/json")


def tokenized_messages(
    body: TokenizeInput, codec: TextCodec, template: ChatTemplate | None, context_length: int
) -> bytes:
    """The answer to `/tokenize` with messages.

    Raises:
        ValueError: as a chat of them.
    """
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or []]
    ids = render_ids(
        template,
        codec,
        body.messages or [],
        max(context_length, MAX_TOKENIZED),
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        split_special_tokens=body.split_special_tokens,
        **({"tools": tools} if tools else {}),
        **body.chat_template_kwargs,
    )
    return msgspec.json.encode({"tokens": ids, "count": len(ids), "max_model_len": context_length})


def tokenized(body: TokenizeInput, codec: TextCodec, context_length: int) -> bytes:
    """The answer to `/tokenize`.

    Raises:
        ValueError: a text is far longer than the context, or there is no tokenizer.
    """
    most = max(context_length, MAX_TOKENIZED)
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt or []
    ids = []
    for index, prompt in enumerate(prompts):
        try:
            ids.append(
                codec.encode(
                    prompt,
                    add_special_tokens=body.add_special_tokens,
                    max_tokens=most,
                    split_special_tokens=bool(body.split_special_tokens),
                )
            )
        except FieldError as error:
            error = error.renamed({"text": "prompt"})
            raise (error if isinstance(body.prompt, str) else error.of_item(index)) from None
    counts = list(map(len, ids))
    single = isinstance(body.prompt, str)
    return msgspec.json.encode(
        {
            "tokens": ids[0] if single else ids,
            "count": counts[0] if single else counts,
            "max_model_len": context_length,
        }
    )


def detokenized(body: DetokenizeInput, codec: TextCodec, vocab_size: int) -> bytes:
    """The answer to `/detokenize`.

    Raises:
        ValueError: an id is none of the vocabulary, or there is no tokenizer.
    """
    nested = isinstance(body.tokens, list)
    texts = []
    for ids in body.tokens if nested else [body.tokens]:
        bad = ids[(ids < 0) | (ids >= vocab_size)]
        if len(bad):
            raise FieldError(f"tokens: {bad[0]} is no token, ids lie in 0 .. {vocab_size - 1}", "tokens")
        texts.append(codec.decode(ids, skip_special_tokens=body.skip_special_tokens))
    # `prompt` is what vLLM's clients read.
    return msgspec.json.encode(dict.fromkeys(("text", "prompt"), texts if nested else texts[0]))


def refused_event(request: GenerateReqInput, message: str) -> dict[str, Any]:
    """The event of a stream that says why there is none."""
    rid = request.rid if isinstance(request.rid, str) else ""
    logger.info("refused", extra={FIELDS: {"rid": rid, "reason": message}})
    meta = {"id": rid, "finish_reason": abort_reason(message), "prompt_tokens": 0, "completion_tokens": 0}
    return {"text": "", "output_ids": [], "meta_info": meta}
