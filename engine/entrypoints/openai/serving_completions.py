"""`/v1/completions`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ...frontend.generate_request import GenerateReqInput, parse_generate_request
from ...frontend.request_preparation import PreparedRequest
from ...frontend.sample_request import SampleRequest
from ...frontend.tokenizer_manager import TokenizerManager
from ...validation.field_error import FieldError
from . import extensions, serving
from .logprobs import CompletionLogprobs
from .protocol import CompletionRequest
from .serving import Answer, Head

# OpenAI's default.
DEFAULT_MAX_TOKENS = 16


class CompletionServing:
    """Generates from text or ids and answers in OpenAI's form."""

    def __init__(self, manager: TokenizerManager, model_name: str) -> None:
        self._manager = manager
        self._model_name = model_name

    async def create(self, body: CompletionRequest, http: Request) -> Response:
        """
        Raises:
            ValueError: the request does not fit the engine.
        """
        head = Head("text_completion", body.model or self._model_name)
        endpoint = serving.Endpoint(
            to_generate=lambda: self._to_generate(body),
            answer=lambda prepared, answers: self._answer(body, head, prepared, answers),
            stream=lambda prepared: self._stream(body, head, prepared),
            is_costly=body.echo or body.logprobs is not None or body.has_extras,
        )
        return await serving.respond(self._manager, body, http, endpoint)

    async def _to_generate(self, body: CompletionRequest) -> GenerateReqInput:
        if body.echo and not self._manager.text.is_there:
            raise FieldError("echo: the checkpoint has no tokenizer", "echo")
        fields = body.generate_fields(DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens)
        if body.bad_words:
            extensions.ban(body.bad_words, fields["sampling_params"], self._manager.text)
        asked = body.logprobs is not None
        return parse_generate_request(
            {
                **fields,
                "text" if body.is_text else "input_ids": body.prompt,
                **body.logprob_fields(asked=asked, num_top=body.logprobs or 0, from_prompt=body.echo and asked),
            }
        )

    def _answer(
        self, body: CompletionRequest, head: Head, prepared: PreparedRequest, answers: list[Answer]
    ) -> dict[str, Any]:
        choices = []
        for index, answer in enumerate(answers):
            prompt_text = self._echo(body, prepared.samples[index])
            extras: dict[str, Any] = {}
            extensions.add_extras(body, answer, body.logprobs or 0, extras, extras)
            if body.return_token_ids:
                extras["prompt_token_ids"] = prepared.samples[index].input_ids.tolist()
            choice = {
                "index": index,
                "text": prompt_text + answer["text"],
                "logprobs": None
                if body.logprobs is None
                else self._logprobs(body, prepared.samples[index]).take(answer),
                "finish_reason": serving.finish_reason(answer),
                "matched_stop": serving.matched_stop(answer),
                **serving.failure_of(answer),
                **extras,
            }
            if body.return_routed_experts and len(answers) > 1:
                choice["sglext"] = serving.routes_of(answer)
            choices.append(choice)
        content = head.make(choices=choices, usage=serving.usage_of(answers, body.n))
        if body.return_routed_experts:
            content["sglext"] = serving.routes_of(answers[0])
        return content

    def _echo(self, body: CompletionRequest, sample: SampleRequest) -> str:
        """The prompt as text, if it is asked for."""
        return self._manager.text.decode(sample.input_ids, skip_special_tokens=False) if body.echo else ""

    def _logprobs(self, body: CompletionRequest, sample: SampleRequest) -> CompletionLogprobs:
        return CompletionLogprobs(
            self._manager.text,
            skip_special_tokens=sample.output_options.skip_special_tokens,
            prompt_ids=sample.input_ids.tolist() if body.echo else None,
            as_ids=body.return_tokens_as_token_ids,
        )

    async def _stream(
        self, body: CompletionRequest, head: Head, prepared: PreparedRequest
    ) -> AsyncIterator[dict[str, Any]]:
        samples = prepared.samples
        last: list[Answer] = [{} for _ in samples]
        logprobs: dict[int, CompletionLogprobs] = {}
        async with aclosing(self._manager.generate(prepared, form="json")) as answers:  # type: ignore[type-var]
            async for item in answers:
                answer: Answer = dict(item)
                index = answer.pop("index", 0)
                is_first = not last[index]
                last[index] = answer
                echo = ""
                if is_first and body.echo:
                    # What grows with the prompt is no work for the event loop.
                    echo = await asyncio.to_thread(self._echo, body, samples[index])
                if is_first and body.logprobs is not None:
                    logprobs[index] = await asyncio.to_thread(self._logprobs, body, samples[index])
                choice = {
                    "index": index,
                    "text": echo + answer["text"],
                    "logprobs": None,
                    "finish_reason": serving.finish_reason(answer),
                    **serving.failure_of(answer),
                }
                if body.return_token_ids:
                    choice["token_ids"] = answer["output_ids"]
                    if is_first:
                        choice["prompt_token_ids"] = samples[index].input_ids.tolist()
                if body.logprobs is not None:
                    take = logprobs[index].take
                    choice["logprobs"] = await asyncio.to_thread(take, answer) if is_first else take(answer)
                usage: dict[str, Any] = (
                    {"usage": serving.usage_so_far(last, body.n)} if body.has_continuous_usage else {}
                )
                yield head.make(choices=[choice], **usage)
                if len(samples) == 1 and "error" in choice:
                    yield serving.failure_of(answer)
                    return
        if body.return_routed_experts:
            extra: dict[str, Any] = {"sglext": serving.routes_of(last[0])}
            if len(samples) > 1:
                extra["sglext"]["choices"] = [serving.routes_of(answer) for answer in last]
            yield head.make(choices=[], **extra)
        if body.include_usage:
            yield head.make(choices=[], usage=serving.usage_of(last, body.n))
