"""`/inference/v1/generate`, and the same at SkyRL's address, whose routes are raw bytes beside their shape."""

from __future__ import annotations

import asyncio
import base64
import io
import time
import uuid
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from ...frontend.generate_request import parse_generate_request
from ...frontend.request_preparation import PreparedRequest
from ...frontend.tokenizer_manager import TokenizerManager
from ...validation.field_error import FieldError
from ..bodies import CLIENT_GONE, BodyReader
from ..bounded_body import release_body
from ..native import first_answer, with_session
from ..openai import extensions, serving
from ..openai.logprobs import Answer, Triple
from ..responses import ClientGoneError, encode_json, unless_disconnected
from .token_protocol import TokenRequest

SESSION_HEADER = "X-Session-ID"


def logprobs_of(answer: Answer, num_top: int) -> dict[str, Any]:
    """For each token its own, then those of the best that were asked for; by id, with the name that older clients read."""
    meta = answer["meta_info"]
    tops: list[list[Triple] | None] = meta.get("output_top_logprobs", [])
    content = []
    for position, own in enumerate(meta["output_token_logprobs"]):
        best = (tops[position] or [])[:num_top] if position < len(tops) else []
        ranks = {token: rank for rank, (_, token, _) in enumerate(best, 1)}
        entries = [
            {"token_id": token, "token": f"token_id:{token}", "logprob": value, "rank": ranks.get(token)}
            for value, token, _ in (own, *(one for one in best if one[1] != own[1]))
        ]
        content.append({**entries[0], "top_logprobs": entries if num_top else []})
    return {"content": content}


def packed_routes(text: str, start: int) -> dict[str, Any]:
    """A numpy file as raw bytes beside their shape."""
    rows = np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)
    data = base64.b64encode(rows.tobytes()).decode("ascii")
    return {"data": data, "shape": list(rows.shape), "dtype": rows.dtype.name, "start": start}


class TokenServing:
    def __init__(self, manager: TokenizerManager, model_name: str) -> None:
        self._manager = manager
        self._model_name = model_name

    async def create(self, body: TokenRequest, http: Request, *, packs_routes: bool) -> Response:
        """
        Raises:
            ValueError: the request does not fit the engine.
        """
        params = body.sampling_params
        most = self._manager.room_for(len(body.token_ids)) if params.max_tokens is None else params.max_tokens
        fields = body.native(most, has_routes=self._manager.config.enable_return_routed_experts)
        fields["rid"] = body.request_id or uuid.uuid4().hex
        if SESSION_HEADER in http.headers:
            fields["session_id"] = http.headers[SESSION_HEADER]
        try:
            if params.bad_words:
                extensions.ban(params.bad_words, fields["sampling_params"], self._manager.text)
            request = with_session(parse_generate_request(fields), http)
            prepared = await unless_disconnected(http, self._manager.prepare(request), PreparedRequest.release)
        except ClientGoneError:
            return Response(status_code=CLIENT_GONE)
        except FieldError as error:
            raise error.renamed(body.names()) from None
        release_body(http)
        try:
            answers = serving.as_list(await unless_disconnected(http, first_answer(self._manager, prepared)))
        except ClientGoneError:
            return Response(status_code=CLIENT_GONE)
        finally:
            prepared.release()
        content = await asyncio.to_thread(self._answer, body, prepared, answers, packs_routes)
        return await encode_json(content, large=True, on_sent=prepared.delivered)

    def _answer(
        self, body: TokenRequest, prepared: PreparedRequest, answers: list[Answer], packs_routes: bool
    ) -> dict[str, Any]:
        params = body.sampling_params
        choices = []
        for index, answer in enumerate(answers):
            choice = {
                "index": index,
                "token_ids": answer["output_ids"],
                "finish_reason": serving.finish_reason(answer),
                "logprobs": None if params.logprobs is None else logprobs_of(answer, params.logprobs),
                **extensions.routes(answer),
                **serving.failure_of(answer),
            }
            if packs_routes and choice["routed_experts"] is not None:
                text = bytes(choice["routed_experts"])[1:-1].decode()
                choice["routed_experts"] = packed_routes(text, params.routed_experts_prompt_start)
            choices.append(choice)
        of_prompt = None
        if params.prompt_logprobs is not None:
            of_prompt = extensions.prompt_logprobs(answers[0], params.prompt_logprobs)
        return {
            "request_id": prepared.request.rid,
            "output_mode": "tokens",
            "model": self._model_name,
            "created": int(time.time()),
            "choices": choices,
            "usage": serving.usage_of(answers, params.n),
            "prompt_logprobs": of_prompt,
            "prompt_token_ids": prepared.samples[0].input_ids.tolist() if body.return_token_ids else None,
            "kv_transfer_params": None,
        }


def token_router(manager: TokenizerManager, bodies: BodyReader, model_name: str) -> APIRouter:
    router = APIRouter(route_class=bodies.route_class())
    tokens = TokenServing(manager, model_name)

    @router.post("/inference/v1/generate")
    async def generate(body: TokenRequest, http: Request) -> Response:
        return await tokens.create(body, http, packs_routes=False)

    @router.post("/skyrl/v1/generate", include_in_schema=False)
    async def skyrl_generate(body: TokenRequest, http: Request) -> Response:
        return await tokens.create(body, http, packs_routes=True)

    return router
