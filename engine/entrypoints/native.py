"""The native API: `/generate` and what belongs to it."""

from __future__ import annotations

import json
import logging
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict
from starlette.responses import Response

from ..generate_request import MAX_NAME_CHARS, GenerateReqInput, SampleRequest
from ..io_struct import RoutedExpertsMeta
from ..routing.claims import ClaimError
from ..tokenizer_manager import TokenizerManager
from .errors import RID_KEY, abort_reason, error_response, json_response
from .json_log import FIELDS
from .responses import (
    CLIENT_GONE,
    ClientGoneError,
    EventStream,
    PiecewiseResponse,
    encode_json,
    only,
    unless_disconnected,
)

logger = logging.getLogger(__name__)

SESSION_HEADER = "X-SMG-Routing-Key"
META_HEADER = "X-Routed-Experts-Meta"
# Clients and proxies refuse a response whose head is longer than some 8 to 16 KiB.
MAX_META_HEADER_CHARS = 6 << 10


class AbortRequestInput(BaseModel):
    """Requests whose rid starts with `rid`, or all."""

    model_config = ConfigDict(extra="forbid")

    rid: str = ""
    abort_all: bool = False


class TokenizeInput(BaseModel):
    model_config = ConfigDict(extra="forbid")

    prompt: str | list[str]
    add_special_tokens: bool = True
    model: str | None = None


class DetokenizeInput(BaseModel):
    model_config = ConfigDict(extra="forbid")

    tokens: list[int] | list[list[int]]
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
        raise ValueError(f"{SESSION_HEADER}: must have 1 to {MAX_NAME_CHARS} characters")
    return request if key is None or request.session_id else request.model_copy(update={"session_id": key})


async def first_answer(
    manager: TokenizerManager, request: GenerateReqInput, samples: list[SampleRequest]
) -> dict[str, Any] | list[Any]:
    """The whole answer of a request without streaming."""
    async with aclosing(manager.generate(request, samples, form="json")) as answers:  # type: ignore[type-var]
        return await anext(answers)


def native_router(manager: TokenizerManager) -> APIRouter:
    """Routes of the native API over `manager`."""
    router = APIRouter()

    @router.post("/generate")
    @router.put("/generate", include_in_schema=False)
    async def generate(body: GenerateReqInput, http: Request) -> Response:
        request = with_session(body, http)

        def refusal(message: str) -> dict[str, Any]:
            return refused_event(request, message)

        try:
            samples = manager.prepare(request)
        except ValueError as error:
            if not request.stream:
                raise
            return EventStream(only(refusal(str(error))), refusal)
        if request.stream:
            return EventStream(manager.generate(request, samples, form="json"), refusal)
        try:
            answer = await unless_disconnected(http, first_answer(manager, request, samples))
        except ClientGoneError:
            return Response(status_code=CLIENT_GONE)
        return await encode_json(answer, large=any(sample.return_routed_experts for sample in samples))

    @router.post("/abort_request")
    async def abort_request(body: AbortRequestInput) -> Response:
        manager.abort_request(body.rid, abort_all=body.abort_all)
        return Response()

    @router.get("/routed_experts/{claim}")
    async def fetch_routed_experts(claim: str) -> Response:
        try:
            routed = await manager.fetch_routed_experts(claim)
        except ClaimError as error:
            return error_response(str(error), 410)
        headers = {META_HEADER: meta_header(routed.meta)}
        return PiecewiseResponse(bytes(routed.frame), headers=headers, media_type="application/octet-stream")

    @router.post("/tokenize")
    async def tokenize(body: TokenizeInput) -> Response:
        prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        ids = [manager.text.encode(prompt, add_special_tokens=body.add_special_tokens) for prompt in prompts]
        counts = [len(tokens) for tokens in ids]
        single = isinstance(body.prompt, str)
        return json_response(
            {
                "tokens": ids[0] if single else ids,
                "count": counts[0] if single else counts,
                "max_model_len": manager.facts["context_length"],
            }
        )

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeInput) -> Response:
        nested = bool(body.tokens) and isinstance(body.tokens[0], list)
        lists: list[Any] = body.tokens if nested else [body.tokens]
        assert manager.limits is not None
        vocab_size = manager.limits.vocab_size
        bad = [token for tokens in lists for token in tokens if not 0 <= token < vocab_size]
        if bad:
            raise ValueError(f"tokens: {bad[0]} is no token, ids lie in 0 .. {vocab_size - 1}")
        texts = [manager.text.decode(tokens, skip_special_tokens=body.skip_special_tokens) for tokens in lists]
        return json_response({"text": texts if nested else texts[0]})

    return router


def refused_event(request: GenerateReqInput, message: str) -> dict[str, Any]:
    """The event of a stream that says why there is none."""
    rid = request.rid if isinstance(request.rid, str) else ""
    logger.info("refused", extra={FIELDS: {"rid": rid, "reason": message}})
    meta = {"id": rid, "finish_reason": abort_reason(message), "prompt_tokens": 0, "completion_tokens": 0}
    return {"text": "", "output_ids": [], "meta_info": meta}
