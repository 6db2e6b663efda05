"""`/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ...frontend.chat_template import ChatTemplate
from ...frontend.cumulative_answer import CumulativeAnswer
from ...frontend.generate_request import CHAR_COST_US, GenerateReqInput, parse_generate_request
from ...frontend.request_preparation import PreparedRequest
from ...frontend.tokenizer_manager import TokenizerManager
from ...validation.field_error import FieldError
from . import serving
from .logprobs import chat_logprobs
from .protocol import ChatCompletionRequest
from .serving import Answer, Head

# What a template takes for a message.
MESSAGE_COST_US = 50.0


class ChatServing:
    """Renders messages, generates, and answers in OpenAI's form."""

    def __init__(self, manager: TokenizerManager, template: ChatTemplate | None, model_name: str) -> None:
        self._manager = manager
        self._template = template
        self._model_name = model_name

    async def create(self, body: ChatCompletionRequest, http: Request) -> Response:
        """
        Raises:
            ValueError: the request does not fit the engine, or the template refuses it.
        """
        head = Head("chat.completion", body.model or self._model_name)
        endpoint = serving.Endpoint(
            to_generate=lambda: self._to_generate(body, http.state.body_bytes),
            answer=lambda _, answers: self._answer(body, head, answers),
            stream=lambda prepared: self._stream(body, head, prepared),
            is_costly=body.logprobs,
        )
        return await serving.respond(self._manager, body, http, endpoint)

    async def _to_generate(self, body: ChatCompletionRequest, num_bytes: int) -> GenerateReqInput:
        ids = body.input_ids
        if ids is None:
            cost_us = MESSAGE_COST_US * len(body.messages) + CHAR_COST_US * num_bytes
            ids = await self._manager.work_threads.run(cost_us, partial(self._rendered_ids, body))
        # What a template leaves out is not bounded by the prompt's tokens, and would stay until the answer ends.
        body.messages, body.chat_template_kwargs = [], {}
        asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        most = self._manager.room_for(len(ids)) if asked is None else asked
        return parse_generate_request(
            {
                **body.generate_fields(most),
                "input_ids": ids,
                "return_logprob": body.logprobs,
                "top_logprobs_num": body.top_logprobs or 0,
            }
        )

    def _rendered_ids(self, body: ChatCompletionRequest) -> list[int]:
        """The messages as the template writes them, tokenised.

        Raises:
            ValueError: there is no template, it refuses the messages, or they do not fit.
        """
        if self._template is None:
            raise FieldError("messages: the checkpoint has no chat template; give input_ids", "messages")
        text = self._template.render(
            [message.for_template() for message in body.messages],
            add_generation_prompt=body.add_generation_prompt,
            **body.chat_template_kwargs,
        )
        assert self._manager.limits is not None
        # The template writes the special tokens that there are.
        return self._manager.text.encode(text, add_special_tokens=False, max_tokens=self._manager.limits.context_length)

    # --- whole ------------------------------------------------------------------------------------------------------

    def _answer(self, body: ChatCompletionRequest, head: Head, answers: list[Answer]) -> dict[str, Any]:
        choices = []
        for index, answer in enumerate(answers):
            choice = {
                "index": index,
                "message": {"role": "assistant", "content": answer["text"]},
                "logprobs": chat_logprobs(answer, self._manager.text) if body.logprobs else None,
                "finish_reason": serving.finish_reason(answer),
                "matched_stop": serving.matched_stop(answer),
                **serving.failure_of(answer),
            }
            choices.append(choice | self._choice_extras(body, answer))
        content = head.make(choices=choices, usage=serving.usage_of(answers, body.n))
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
        self, body: ChatCompletionRequest, head: Head, prepared: PreparedRequest
    ) -> AsyncIterator[dict[str, Any]]:
        samples = prepared.samples
        # What the last chunk of a choice tells of all its tokens.
        whole = [CumulativeAnswer() for _ in samples]
        last: list[Answer] = [{} for _ in samples]
        for index in range(len(samples)):
            yield self._chunk(head, index, {"role": "assistant", "content": ""}, None)
        async with aclosing(self._manager.generate(prepared, form="json")) as answers:  # type: ignore[type-var]
            async for item in answers:
                answer: Answer = dict(item)
                index = answer.pop("index", 0)
                last[index] = answer
                if body.return_meta_info:
                    whole[index].add(answer)
                yield self._delta(body, head, index, answer, whole[index])
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

    def _delta(
        self, body: ChatCompletionRequest, head: Head, index: int, answer: Answer, whole: CumulativeAnswer
    ) -> dict[str, Any]:
        """What is new of one choice."""
        fields: dict[str, Any] = {}
        if body.logprobs:
            fields["logprobs"] = chat_logprobs(answer, self._manager.text)
        reason = serving.finish_reason(answer)
        if reason is not None:
            fields["matched_stop"] = serving.matched_stop(answer)
            fields |= serving.failure_of(answer)
            if body.return_meta_info:
                fields["meta_info"] = meta_info(whole.render())
        return self._chunk(head, index, {"content": answer["text"]}, reason, **fields)


def meta_info(answer: Answer) -> dict[str, Any]:
    """What the native API tells of an answer beside its text."""
    meta: dict[str, Any] = answer["meta_info"] | {"output_ids": answer["output_ids"]}
    return meta
