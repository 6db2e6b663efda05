"""What lacks its part of a checkpoint is refused with the reason: chat without a template that works, echo without text.
Streams tell what is new, and a chat's last chunk with `return_meta_info` what is true of the whole."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from waybill.engine.chat_formats.formats import ChatFormats
from waybill.engine.entrypoints.openai.chat_prompt import ChatPrompt
from waybill.engine.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest
from waybill.engine.entrypoints.openai.serving import Head
from waybill.engine.entrypoints.openai.serving_chat import ChatServing
from waybill.engine.entrypoints.openai.serving_completions import CompletionServing
from waybill.engine.frontend.chat_template import ChatTemplate
from waybill.engine.frontend.text_codec import TextCodec
from waybill.engine.frontend.work_threads import WorkThreads
from waybill.engine.validation.request_model import validate

CHECKPOINT = Path(__file__).parents[4] / "examples" / "tiny_moe" / "checkpoint"
BROKEN = ChatTemplate({"default": "{% nonsense %}"}, {})
MESSAGES = [{"role": "user", "content": "a"}]


def to_generate(template: ChatTemplate | None, **fields: Any) -> Any:
    manager: Any = SimpleNamespace(text=TextCodec(None), room_for=lambda num_prompt: 5, work_threads=WorkThreads())
    body = ChatCompletionRequest(**fields)
    manager.limits = SimpleNamespace(context_length=100)
    request, _ = asyncio.run(ChatServing(manager, template, "m")._to_generate(body, num_bytes=100))
    return request


@pytest.mark.parametrize(
    ("template", "words"),
    [(None, "has no chat template"), (BROKEN, "'default' cannot be compiled: Encountered unknown")],
)
def test_messages_are_refused_and_ids_taken(template: ChatTemplate | None, words: str) -> None:
    with pytest.raises(ValueError, match=rf"^messages: .*{words}.*; give input_ids$"):
        to_generate(template, messages=MESSAGES)
    assert to_generate(template, input_ids=[1, 2]).input_ids.tolist() == [1, 2]


def test_ids_of_a_caller_are_no_matter_of_the_reader_of_reasoning() -> None:
    """Those that are no tokens are refused with the engine's request; a decoder would fail on them."""
    codec = TextCodec(Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")))
    body = ChatCompletionRequest(input_ids=[104, -1, 105])
    assert ChatPrompt.of(body, body.input_ids, ChatFormats(reasoning="qwen3"), codec).tail == codec.decode(
        [104, 105], skip_special_tokens=False
    )


def test_tools_are_read_on_a_thread_beside_ids() -> None:
    """There may be as many as a body has room for."""
    threads: list[str] = []

    class Text(TextCodec):
        @property
        def is_there(self) -> bool:
            threads.append(threading.current_thread().name)
            return False

    manager: Any = SimpleNamespace(text=Text(None), room_for=lambda num_prompt: 5, work_threads=WorkThreads())
    tools = [{"type": "function", "function": {"name": "f"}}]
    body = ChatCompletionRequest(input_ids=[1], tools=tools)
    asyncio.run(ChatServing(manager, None, "m", ChatFormats("hermes", "qwen3"))._to_generate(body, num_bytes=10_000))
    assert threads[0].startswith("short work")


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


def prompt(body: ChatCompletionRequest, **formats: str) -> ChatPrompt:
    return ChatPrompt.of(body, [], ChatFormats(**formats), TextCodec(None))


def chunk(text: str, ids: list[int], reason: dict[str, Any] | None, num_tokens: int) -> dict[str, Any]:
    meta = {
        **{"id": "r", "finish_reason": reason, "prompt_tokens": 4, "completion_tokens": num_tokens, "cached_tokens": 0},
        "output_token_logprobs": [(-1.0 * one, one, None) for one in ids],
    }
    return {"text": text, "output_ids": ids, "meta_info": meta}


CHUNKS = (chunk("a", [1], None, 1), chunk("", [2], None, 2), chunk("bc", [3, 4], {"type": "length", "length": 4}, 4))


def stream_of(
    serving: Any, body: Any, prompt_of: ChatPrompt | None = None, chunks: Sequence[dict[str, Any]] = CHUNKS
) -> list[dict[str, Any]]:
    """The events of a stream of one choice, whose engine's chunks are these."""

    async def generate(prepared: Any, *, form: str) -> AsyncIterator[dict[str, Any]]:
        for one in chunks:
            yield one

    async def run() -> list[dict[str, Any]]:
        serving._manager.generate = generate
        options = SimpleNamespace(skip_special_tokens=True)
        prepared = SimpleNamespace(samples=[SimpleNamespace(output_options=options, input_ids=np.array([7, 8]))])
        prompt = () if prompt_of is None else (prompt_of,)
        return [event async for event in serving._stream(body, Head("any", "m"), *prompt, prepared)]

    return asyncio.run(run())


def test_a_chat_stream_tells_what_is_new_and_at_its_end_of_the_whole() -> None:
    manager: Any = SimpleNamespace(text=TextCodec(None))
    body = ChatCompletionRequest(
        messages=MESSAGES, stream=True, stream_options={"include_usage": True}, logprobs=True, return_meta_info=True
    )
    _, *parts, usage = stream_of(ChatServing(manager, None, "m"), body, prompt(body))
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


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = 'I look.\n<tool_call>{"name": "look", "arguments": {"a": 1}}</tool_call>'


def tool_chunks() -> list[dict[str, Any]]:
    """One character a token, and the end with the last one."""
    parts = [chunk(one, [ord(one)], None, number + 1) for number, one in enumerate("<think>hm</think>" + CALL)]
    parts[-1]["meta_info"]["finish_reason"] = {"type": "stop", "matched": 2}
    return parts


def test_a_chat_stream_tells_reasoning_then_text_then_calls() -> None:
    manager: Any = SimpleNamespace(text=TextCodec(None))
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = ChatCompletionRequest(
        messages=MESSAGES, tools=[TOOL], stream=True, stream_options=options, return_token_ids=True
    )
    prompt_of = prompt(body, tools="hermes", reasoning="qwen3")
    events = stream_of(ChatServing(manager, None, "m"), body, prompt_of, tool_chunks())
    assert events[0]["prompt_token_ids"] == [7, 8]
    choices = [event["choices"][0] for event in events if event["choices"]]
    deltas = [choice["delta"] for choice in choices]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm"
    assert "".join(delta.get("content") or "" for delta in deltas) == "I look."
    (call,) = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert call["index"] == 0 and call["id"].startswith("call_") and call["type"] == "function"
    assert call["function"] == {"name": "look", "arguments": '{"a": 1}'}
    assert [choice["finish_reason"] for choice in choices][-1] == "tool_calls"
    ids = [token for choice in choices for token in choice.get("token_ids", [])]
    assert bytes(ids).decode() == "<think>hm</think>" + CALL, (
        "every token is told of once, also where nothing is settled"
    )
    counts = [event["usage"]["completion_tokens"] for event in events[1:]]
    assert counts == sorted(counts) and counts[-1] == len(ids)


def whole(body: ChatCompletionRequest, text: str, **formats: str) -> dict[str, Any]:
    manager: Any = SimpleNamespace(text=TextCodec(None))
    prepared: Any = SimpleNamespace(samples=[SimpleNamespace(input_ids=np.array([7, 8]))])
    answer = chunk(text, [1, 2], {"type": "stop", "matched": 2}, 2)
    serving = ChatServing(manager, None, "m")
    return serving._answer(body, Head("chat.completion", "m"), prompt(body, **formats), prepared, [answer])


def test_a_whole_chat_answer_has_the_same() -> None:
    body = ChatCompletionRequest(messages=MESSAGES, tools=[TOOL], return_token_ids=True)
    answer = whole(body, "<think>hm</think>" + CALL, tools="hermes", reasoning="qwen3")
    message = answer["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("I look.", "hm")
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["look"]
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    assert (answer["prompt_token_ids"], answer["choices"][0]["token_ids"]) == ([7, 8], [1, 2])
    body = ChatCompletionRequest(messages=MESSAGES, tools=[TOOL], tool_choice="none", separate_reasoning=False)
    text = "<think>hm</think>" + CALL
    assert whole(body, text, tools="hermes", reasoning="qwen3")["choices"][0]["message"]["content"] == text


def test_a_call_that_must_be_made_is_a_bound_on_the_output() -> None:
    asked: dict[str, Any] = {"input_ids": [1, 2], "tools": [TOOL]}
    request = to_generate(None, **asked, tool_choice="required", parallel_tool_calls=False)
    schema = request.sampling_params.json_schema
    assert schema["minItems"] == schema["maxItems"] == 1
    assert schema["items"]["properties"]["name"] == {"const": "look"}
    named = to_generate(None, **asked, tool_choice={"type": "function", "function": {"name": "look"}})
    assert named.sampling_params.json_schema == schema
    with pytest.raises(ValueError, match="tools: how the model writes calls is not known"):
        to_generate(None, **asked)
    with pytest.raises(ValueError, match="tools: the checkpoint's chat template takes none"):
        to_generate(
            ChatTemplate({"default": "{{ messages }}"}, {}), messages=MESSAGES, tools=[TOOL], tool_choice="required"
        )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tool_choice": "required"}, "tool_choice: needs tools"),
        ({"tools": [TOOL], "tool_choice": {"function": {"name": "f"}}}, "must name one of the tools, look"),
        ({"tools": [TOOL], "tool_choice": "required", "regex": "a"}, "tool_choice: must be 'auto' or 'none' beside"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"continue_final_message": True}, "the last message must be of the role assistant"),
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        validate(ChatCompletionRequest, {"messages": MESSAGES, **fields})


def test_arguments_of_earlier_calls_reach_the_template_as_objects() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}}
    body = ChatCompletionRequest(messages=[{"role": "assistant", "content": None, "tool_calls": [call]}])
    message = body.messages[0].for_template()
    assert message["tool_calls"][0]["function"]["arguments"] == {"a": 1} and message["content"] == ""
