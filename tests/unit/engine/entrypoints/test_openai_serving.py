"""What lacks its part of a checkpoint is refused with the reason: chat without a template that works, echo without text.
Streams tell what is new, and a chat's last chunk with `return_meta_info` what is true of the whole."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from waybill.engine.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest
from waybill.engine.entrypoints.openai.serving import Head
from waybill.engine.entrypoints.openai.serving_chat import ChatServing
from waybill.engine.entrypoints.openai.serving_completions import CompletionServing
from waybill.engine.frontend.chat_template import ChatTemplate
from waybill.engine.frontend.text_codec import TextCodec
from waybill.engine.frontend.work_threads import WorkThreads

BROKEN = ChatTemplate({"default": "{% nonsense %}"}, {})
MESSAGES = [{"role": "user", "content": "a"}]


def to_generate(template: ChatTemplate | None, **fields: Any) -> Any:
    manager: Any = SimpleNamespace(text=TextCodec(None), room_for=lambda num_prompt: 5, work_threads=WorkThreads())
    body = ChatCompletionRequest(**fields)
    return asyncio.run(ChatServing(manager, template, "m")._to_generate(body, num_bytes=100))


@pytest.mark.parametrize(
    ("template", "words"),
    [(None, "has no chat template"), (BROKEN, "'default' cannot be compiled: Encountered unknown")],
)
def test_messages_are_refused_and_ids_taken(template: ChatTemplate | None, words: str) -> None:
    with pytest.raises(ValueError, match=rf"^messages: .*{words}.*; give input_ids$"):
        to_generate(template, messages=MESSAGES)
    assert to_generate(template, input_ids=[1, 2]).input_ids.tolist() == [1, 2]


def test_what_a_template_may_leave_out_does_not_stay_until_the_answer_ends() -> None:
    """The budget of bodies has its bytes back by then."""
    manager: Any = SimpleNamespace(text=TextCodec(None), room_for=lambda num_prompt: 5, work_threads=WorkThreads())
    body = ChatCompletionRequest(messages=MESSAGES, input_ids=[1], chat_template_kwargs={"x": "y" * 1000})
    asyncio.run(ChatServing(manager, None, "m")._to_generate(body, num_bytes=1000))
    assert (body.messages, body.chat_template_kwargs) == ([], {})


def test_without_a_tokenizer_nothing_is_echoed() -> None:
    manager: Any = SimpleNamespace(text=TextCodec(None))
    serving = CompletionServing(manager, "m")
    request = asyncio.run(serving._to_generate(CompletionRequest(prompt=[1, 2])))
    assert request.input_ids.tolist() == [1, 2]
    with pytest.raises(ValueError, match="echo: the checkpoint has no tokenizer"):
        asyncio.run(serving._to_generate(CompletionRequest(prompt=[1, 2], echo=True)))


def chunk(text: str, ids: list[int], reason: dict[str, Any] | None, num_tokens: int) -> dict[str, Any]:
    meta = {
        **{"id": "r", "finish_reason": reason, "prompt_tokens": 4, "completion_tokens": num_tokens, "cached_tokens": 0},
        "output_token_logprobs": [(-1.0 * one, one, None) for one in ids],
    }
    return {"text": text, "output_ids": ids, "meta_info": meta}


CHUNKS = (chunk("a", [1], None, 1), chunk("", [2], None, 2), chunk("bc", [3, 4], {"type": "length", "length": 4}, 4))


def stream_of(serving: Any, body: Any) -> list[dict[str, Any]]:
    """The events of a stream of one choice, whose engine's chunks are these."""

    async def generate(prepared: Any, *, form: str) -> AsyncIterator[dict[str, Any]]:
        for one in CHUNKS:
            yield one

    async def run() -> list[dict[str, Any]]:
        serving._manager.generate = generate
        options = SimpleNamespace(skip_special_tokens=True)
        prepared = SimpleNamespace(samples=[SimpleNamespace(output_options=options)])
        return [event async for event in serving._stream(body, Head("any", "m"), prepared)]

    return asyncio.run(run())


def test_a_chat_stream_tells_what_is_new_and_at_its_end_of_the_whole() -> None:
    manager: Any = SimpleNamespace(text=TextCodec(None))
    body = ChatCompletionRequest(
        messages=MESSAGES, stream=True, stream_options={"include_usage": True}, logprobs=True, return_meta_info=True
    )
    _, *parts, usage = stream_of(ChatServing(manager, None, "m"), body)
    choices = [part["choices"][0] for part in parts]
    assert [choice["delta"]["content"] for choice in choices] == ["a", "", "bc"]
    assert [[entry["logprob"] for entry in choice["logprobs"]["content"]] for choice in choices] == [
        [-1.0],
        [-2.0],
        [-3.0, -4.0],
    ]
    assert ["meta_info" in choice for choice in choices] == [False, False, True]
    meta = choices[-1]["meta_info"]
    assert meta["output_ids"] == [1, 2, 3, 4] and len(meta["output_token_logprobs"]) == meta["completion_tokens"] == 4
    assert usage["usage"]["total_tokens"] == 8


def test_a_stream_of_completions_tells_what_is_new() -> None:
    manager: Any = SimpleNamespace(text=TextCodec(None))
    parts = stream_of(CompletionServing(manager, "m"), CompletionRequest(prompt=[1], stream=True, logprobs=0))
    choices = [part["choices"][0] for part in parts]
    assert [choice["text"] for choice in choices] == ["a", "", "bc"]
    assert [choice["logprobs"]["token_logprobs"] for choice in choices] == [[-1.0], [-2.0], [-3.0, -4.0]]
