"""What both endpoints of OpenAI's API have in common: answers as choices, usage, and the routes beside them."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ...frontend.generate_request import GenerateReqInput
from ...frontend.request_preparation import PreparedRequest
from ...frontend.tokenizer_manager import TokenizerManager
from ...validation.field_error import FieldError
from ..bodies import CLIENT_GONE
from ..bounded_body import release_body
from ..errors import abort_reason, error_body
from ..native import first_answer, is_large, with_session
from ..responses import ClientGoneError, EventStream, encode_json, only, unless_disconnected
from .protocol import OpenAIRequest

ROUTE_FIELDS = (
    "routed_experts",
    "routed_experts_error",
    "routed_experts_claim",
    "routed_experts_meta",
    "routed_experts_start_len",
    "routed_experts_prefix",
    "routed_experts_dtype",
    "router_weights",
    "router_weights_error",
    "router_weights_meta",
)

# A whole answer, or what is new of one in a stream.
Answer = dict[str, Any]


@dataclass
class Head:
    """What every object of one answer begins with."""

    kind: str
    model: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def make(self, suffix: str = "", **fields: Any) -> dict[str, Any]:
        prefix = "chatcmpl" if self.kind.startswith("chat") else "cmpl"
        return {
            "id": f"{prefix}-{self.id}",
            "object": self.kind + suffix,
            "created": self.created,
            "model": self.model,
            **fields,
        }


def finish_reason(answer: Answer) -> str | None:
    reason = answer["meta_info"]["finish_reason"]
    return None if reason is None else str(reason["type"])


def matched_stop(answer: Answer) -> int | str | None:
    reason = answer["meta_info"]["finish_reason"] or {}
    matched: int | str | None = reason.get("matched")
    return matched


def failure_of(answer: Answer) -> dict[str, Any]:
    """The `error` of a choice that the engine failed; {} otherwise."""
    reason = answer["meta_info"]["finish_reason"] or {}
    status = reason.get("status_code") or 0
    return error_body(reason["message"], status) if status >= 500 else {}


def routes_of(answer: Answer) -> dict[str, Any]:
    """The `sglext` of an answer; {} where nobody opted in."""
    meta = answer["meta_info"]
    return {name: meta[name] for name in ROUTE_FIELDS if name in meta}


def usage_of(answers: list[Answer], num_samples: int) -> dict[str, Any]:
    """Tokens of all choices; a prompt counts once, however many samples it has."""
    metas = [answer["meta_info"] for answer in answers]
    prompt = sum(meta["prompt_tokens"] for meta in metas[::num_samples])
    completion = sum(meta["completion_tokens"] for meta in metas)
    cached = sum(meta["cached_tokens"] for meta in metas[::num_samples])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def usage_so_far(answers: list[Answer], num_samples: int) -> dict[str, Any]:
    """The same in the midst of a stream, in which some choices ({}) have nothing yet."""
    prompts = [answers[first : first + num_samples] for first in range(0, len(answers), num_samples)]
    nothing = {"prompt_tokens": 0, "completion_tokens": 0, "cached_tokens": 0}
    filled = []
    for group in prompts:
        begun = [one for one in group if one]
        waiting = {
            "meta_info": {**nothing, **({"prompt_tokens": begun[0]["meta_info"]["prompt_tokens"]} if begun else {})}
        }
        filled += [one or waiting for one in group]
    return usage_of(filled, num_samples)


def as_list(answer: Answer | list[Any]) -> list[Answer]:
    return answer if isinstance(answer, list) else [answer]


@dataclass(frozen=True)
class Endpoint:
    """What one endpoint makes of one request: the engine's request, the whole answer, and the events of a stream. An answer
    `is_costly` where making it takes long enough to hold up others."""

    to_generate: Callable[[], Awaitable[GenerateReqInput]]
    answer: Callable[[PreparedRequest, list[Answer]], dict[str, Any]]
    stream: Callable[[PreparedRequest], AsyncIterator[dict[str, Any]]]
    is_costly: bool = False


async def respond(manager: TokenizerManager, body: OpenAIRequest, http: Request, endpoint: Endpoint) -> Response:
    """
    Raises:
        ValueError: the request does not fit the engine, and has no stream to say so in.
    """

    def refusal(error: Exception) -> dict[str, Any]:
        return refused_event(in_words_of(body, error))

    async def prepare() -> PreparedRequest:
        prepared = await manager.prepare(with_session(await endpoint.to_generate(), http))
        # Tokens have taken its place.
        release_body(http)
        return prepared

    try:
        prepared = await unless_disconnected(http, prepare(), PreparedRequest.release)
        if body.stream:
            events = endpoint.stream(prepared)
            return EventStream(events, refusal, on_end=prepared.release, on_sent=prepared.delivered)
        try:
            answers = as_list(await unless_disconnected(http, first_answer(manager, prepared)))
        finally:
            prepared.release()
    except ClientGoneError:
        return Response(status_code=CLIENT_GONE)
    except ValueError as error:
        if not body.stream:
            raise in_words_of(body, error) from None
        return EventStream(only(refusal(error)), refusal)
    if endpoint.is_costly:
        content = await asyncio.to_thread(endpoint.answer, prepared, answers)
    else:
        content = endpoint.answer(prepared, answers)
    return await encode_json(content, large=is_large(prepared), on_sent=prepared.delivered)


def in_words_of(body: OpenAIRequest, error: Exception) -> Exception:
    """A refusal of the engine with the names that fields have here."""
    return error.renamed(body.names()) if isinstance(error, FieldError) else error


def refused_event(error: Exception) -> dict[str, Any]:
    """The event of a stream that says why there is none."""
    body = error_body(error, 400)
    body["error"]["finish_reason"] = abort_reason(str(error))
    return body
