"""`/v1/chat/completions`."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ...chat_formats.formats import ChatFormats
from ...frontend.chat_template import ChatTemplate
from ...frontend.cumulative_answer import CumulativeAnswer
from ...frontend.generate_request import CHAR_COST_US, GenerateReqInput, parse_generate_request
from ...frontend.request_preparation import PreparedRequest
from ...frontend.tokenizer_manager import TokenizerManager
from ...validation.field_error import FieldError
from ..responses import encode_json
from . import extensions, serving
from .chat_answer import ChatAnswer
from .chat_prompt import ChatPrompt, render_ids
from .logprobs import chat_logprobs
from .protocol import ChatCompletionRequest
from .serving import Answer, Head

# Sampling parameters of both requests.
RENDERED_NAMES = (
    *("n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("stop", "stop_token_ids", "ignore_eos", "logit_bias", "min_tokens", "seed", "include_stop_str_in_output"),
    *("allowed_token_ids", "bad_words", "prompt_logprobs", "routed_experts_prompt_start"),
)
# What a template takes for a message.
MESSAGE_COST_US = 50.0


class ChatServing:
    """Renders messages, generates, and answers in OpenAI's form."""

    def __init__(
        self,
        manager: TokenizerManager,
        template: ChatTemplate | None,
        model_name: str,
        formats: ChatFormats | None = None,
    ) -> None:
        self._manager = manager
        self._template = template
        self._model_name = model_name
        self._formats = formats or ChatFormats()

    async def create(self, body: ChatCompletionRequest, http: Request) -> Response:
        """
        Raises:
            ValueError: the request does not fit the engine, or the template refuses it.
        """
        head = Head("chat.completion", body.model or self._model_name)
        prompts: list[ChatPrompt] = []

        async def to_generate() -> GenerateReqInput:
            request, prompt = await self._to_generate(body, http.state.body_bytes)
            prompts.append(prompt)
            return request

        endpoint = serving.Endpoint(
            to_generate=to_generate,
            answer=lambda prepared, answers: self._answer(body, head, prompts[0], prepared, answers),
            stream=lambda prepared: self._stream(body, head, prompts[0], prepared),
            is_costly=body.logprobs or body.has_extras,
        )
        return await serving.respond(self._manager, body, http, endpoint)

    async def render(self, body: ChatCompletionRequest, http: Request) -> Response:
        """The prompt's ids and the parameters in vLLM's words, as `/inference/v1/generate` takes them.

        Raises:
            ValueError: as a chat of them, or it has images, which that endpoint does not take.
        """
        if any(message.images for message in body.messages):
            raise FieldError("messages: a prompt that is rendered has no images; send the chat itself", "messages")
        asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        ids = body.input_ids
        if ids is None:
            cost_us = MESSAGE_COST_US * len(body.messages) + CHAR_COST_US * http.state.body_bytes
            ids = await self._manager.work_threads.run(cost_us, partial(self._rendered_ids, body))
        # The engine's own checks, of all fields.
        fields = body.generate_fields(asked)
        parse_generate_request({**fields, "input_ids": ids})
        params = {name: getattr(body, name) for name in RENDERED_NAMES}
        params |= {"max_tokens": asked, "logprobs": (body.top_logprobs or 0) if body.logprobs else None}
        content = {
            "request_id": body.rid or body.request_id or uuid.uuid4().hex,
            "token_ids": list(map(int, ids)),
            "features": None,
            "sampling_params": {name: value for name, value in params.items() if value is not None},
            "model": body.model or self._model_name,
            "cache_salt": body.cache_salt,
            "priority": body.priority,
        }
        return await encode_json(content, large=True)

    async def _to_generate(self, body: ChatCompletionRequest, num_bytes: int) -> tuple[GenerateReqInput, ChatPrompt]:
        cost_us = 0.0
        if body.input_ids is None or body.tools:
            cost_us = MESSAGE_COST_US * len(body.messages) + CHAR_COST_US * num_bytes
        return await self._manager.work_threads.run(cost_us, partial(self._read, body))

    def _read(self, body: ChatCompletionRequest) -> tuple[GenerateReqInput, ChatPrompt]:
        ids = self._rendered_ids(body) if body.input_ids is None else body.input_ids
        images = [image for message in body.messages for image in message.images]
        prompt = ChatPrompt.of(body, ids, self._formats, self._manager.text)
        # What a template leaves out is not bounded by the prompt's tokens, and would stay until the answer ends.
        body.messages, body.chat_template_kwargs = [], {}
        asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        most = self._manager.room_for(len(ids)) if asked is None else asked
        fields = body.generate_fields(most)
        if body.must_call:
            fields["sampling_params"]["json_schema"] = body.calls_schema()
        fields |= {
            "input_ids": ids,
            "image_data": images,
            **body.logprob_fields(asked=body.logprobs, num_top=body.top_logprobs or 0),
        }
        if body.bad_words:
            extensions.ban(body.bad_words, fields["sampling_params"], self._manager.text)
        request = prompt.to_generate(fields, self._manager.text)
        if images and asked is None:
            request.fill_room()
        return request, prompt

    def _rendered_ids(self, body: ChatCompletionRequest) -> list[int]:
        assert self._manager.limits is not None
        tools = body.callable_tools
        return render_ids(
            self._template,
            self._manager.text,
            body.messages,
            self._manager.limits.context_length,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            split_special_tokens=body.split_special_tokens,
            **({"tools": tools} if tools else {}),
            **body.chat_template_kwargs,
        )

    # --- whole ------------------------------------------------------------------------------------------------------

    def _answer(
        self,
        body: ChatCompletionRequest,
        head: Head,
        prompt: ChatPrompt,
        prepared: PreparedRequest,
        answers: list[Answer],
    ) -> dict[str, Any]:
        choices = []
        of_prompt: dict[str, Any] = {}
        for index, answer in enumerate(answers):
            extras: dict[str, Any] = {}
            extensions.add_extras(body, answer, body.top_logprobs or 0, extras, of_prompt)
            read = ChatAnswer(prompt.reader())
            choice = {
                "index": index,
                "message": read.message(answer["text"]),
                "logprobs": chat_logprobs(answer, self._manager.text, as_ids=body.return_tokens_as_token_ids)
                if body.logprobs
                else None,
                "finish_reason": read.finish_reason(serving.finish_reason(answer)),
                "matched_stop": serving.matched_stop(answer),
                **serving.failure_of(answer),
            }
            choices.append(choice | extras | self._choice_extras(body, answer))
        content = head.make(choices=choices, usage=serving.usage_of(answers, body.n), **of_prompt)
        if body.return_token_ids:
            content["prompt_token_ids"] = prepared.samples[0].input_ids.tolist()
        if body.return_routed_experts:
            content["sglext"] = serving.routes_of(answers[0])
        return content

    @staticmethod
    def _choice_extras(body: ChatCompletionRequest, answer: Answer) -> dict[str, Any]:
        extras: dict[str, Any] = {}
        if body.return_meta_info:
            extras["meta_info"] = meta_info(answer)
        if body.return_routed_experts and body.n > 1:
            extras["sglext"] = serving.routes_of(answer)
        return extras

    # --- streams ----------------------------------------------------------------------------------------------------

    async def _stream(
        self, body: ChatCompletionRequest, head: Head, prompt: ChatPrompt, prepared: PreparedRequest
    ) -> AsyncIterator[dict[str, Any]]:
        samples = prepared.samples
        # What the last chunk of a choice tells of all its tokens.
        whole = [CumulativeAnswer() for _ in samples]
        read = [ChatAnswer(prompt.reader()) for _ in samples]
        last: list[Answer] = [{} for _ in samples]
        for index in range(len(samples)):
            first = self._chunk(head, index, {"role": "assistant", "content": ""}, None)
            if body.return_token_ids:
                first["prompt_token_ids"] = samples[index].input_ids.tolist()
            yield first
        async with aclosing(self._manager.generate(prepared, form="json")) as answers:  # type: ignore[type-var]
            async for item in answers:
                answer: Answer = dict(item)
                index = answer.pop("index", 0)
                last[index] = answer
                if body.return_meta_info:
                    whole[index].add(answer)
                for chunk in self._deltas(body, head, index, answer, read[index], whole[index]):
                    if body.has_continuous_usage:
                        chunk["usage"] = serving.usage_so_far(last, body.n)
                    yield chunk
                failure = serving.failure_of(answer)
                if failure and body.n == 1:
                    yield failure
                    return
        if body.return_routed_experts:
            extra: dict[str, Any] = {"sglext": serving.routes_of(last[0])}
            if body.n > 1:
                extra["sglext"]["choices"] = [serving.routes_of(answer) for answer in last]
            yield head.make(".chunk", choices=[], **extra)
        if body.include_usage:
            yield head.make(".chunk", choices=[], usage=serving.usage_of(last, body.n))

    @staticmethod
    def _chunk(head: Head, index: int, delta: dict[str, Any], reason: str | None, **fields: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason, **fields}
        return head.make(".chunk", choices=[choice])

    def _deltas(
        self,
        body: ChatCompletionRequest,
        head: Head,
        index: int,
        answer: Answer,
        read: ChatAnswer,
        whole: CumulativeAnswer,
    ) -> list[dict[str, Any]]:
        """What is new of one choice: a chunk for each thing that its text settles. The first one has what belongs to the
        tokens, the last one what belongs to the end."""
        reason = serving.finish_reason(answer)
        found = read.push(answer["text"], is_last=reason is not None)
        fields: dict[str, Any] = {}
        if body.logprobs:
            fields["logprobs"] = chat_logprobs(answer, self._manager.text, as_ids=body.return_tokens_as_token_ids)
        if body.return_token_ids:
            fields["token_ids"] = answer["output_ids"]
        if not found and (fields or reason is not None):
            found = [{}] if read.num_calls else [{"content": ""}]
        ending: dict[str, Any] = {}
        if reason is not None:
            ending = {"matched_stop": serving.matched_stop(answer), **serving.failure_of(answer)}
            if body.return_meta_info:
                ending["meta_info"] = meta_info(whole.render())
        chunks = []
        for place, delta in enumerate(found):
            is_last = place == len(found) - 1
            more = {**(fields if place == 0 else {}), **(ending if is_last else {})}
            chunks.append(self._chunk(head, index, delta, read.finish_reason(reason) if is_last else None, **more))
        return chunks


def meta_info(answer: Answer) -> dict[str, Any]:
    """What the native API tells of an answer beside its text."""
    meta: dict[str, Any] = answer["meta_info"] | {"output_ids": answer["output_ids"]}
    return meta
