"""What lacks its part of a checkpoint is refused with the reason: chat without a template that works, echo without text."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from waybill.engine.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest
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
