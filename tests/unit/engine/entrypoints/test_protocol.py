"""OpenAI's requests: what is accepted, what is refused, and what becomes of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from waybill.engine.entrypoints.errors import error_body
from waybill.engine.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest
from waybill.engine.entrypoints.openai.serving import usage_of
from waybill.engine.validation.field_error import FieldError
from waybill.engine.validation.request_model import validate

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}


def test_null_means_the_default() -> None:
    body = ChatCompletionRequest(**CHAT, temperature=None, stop=None, tools=None, top_p=0.5)
    params = body.generate_fields(7)["sampling_params"]
    assert params["top_p"] == 0.5 and params["max_new_tokens"] == 7
    assert "temperature" not in params and "stop" not in params


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "json"}},
        {"suffix": "x"},
        {"best_of": True},
        *(
            {"tool_choice": choice}
            for choice in ("required", {"type": "function", "function": {"name": "f"}}, "", ["auto", 1], 1)
        ),
        {"function_call": {"name": "f"}},
        *(
            {name: True}
            for name in ("n", "seed", "max_tokens", "max_completion_tokens", "min_tokens", "top_k", "priority")
        ),
        *({name: True} for name in ("temperature", "top_p", "routed_dp_rank", "routed_experts_start_len")),
        {"logprobs": True, "top_logprobs": True},
        {"stop_token_ids": [True]},
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        {"best_of": 3},
        {"colour": "red"},
        {"n": 0},
        {"stream_options": {"include_usage": True}},
        {"top_logprobs": 3},
        {"chat_template_kwargs": {"messages": []}},
        {"messages": []},
        {"continue_final_message": True},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
    ],
)
def test_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ChatCompletionRequest(**(CHAT | fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
        {"response_format": {"type": "text"}, "user": "me", "metadata": {"a": "b"}, "store": False},
        {"messages": [], "input_ids": [1]},
        {"messages": [], "input_ids": np.array([1])},
        *({"tool_choice": choice} for choice in ("none", "auto", None)),
        {"seed": -1},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}], "name": "n"}]},
    ],
)
def test_accepted(fields: dict[str, Any]) -> None:
    ChatCompletionRequest(**(CHAT | fields))


def with_detail(detail: Any) -> ChatCompletionRequest:
    part = {"type": "image_url", "image_url": {"url": "data:,", "detail": detail}}
    return validate(ChatCompletionRequest, CHAT | {"messages": [{"role": "user", "content": [part]}]})


def test_an_image_is_looked_at_as_closely_as_can_be_or_refused() -> None:
    """Whoever asks for a few tokens gets the reason, not a prompt of thousands."""
    for detail in ("auto", "high", None):
        assert with_detail(detail).messages[0].images == ["data:,"]
    with pytest.raises(FieldError, match=r"image_url.detail: 'low' is not served: how many tokens an image has"):
        with_detail("low")
    for detail in ("High", "", 1, ["low"], True):
        with pytest.raises(FieldError, match="detail"):
            with_detail(detail)


def test_parts_are_joined_and_extras_reach_the_template() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (message,) = ChatCompletionRequest(messages=[{"role": "user", "content": parts, "name": "n"}]).messages
    assert message.for_template() == {"role": "user", "content": "ab", "name": "n"}


def test_prompts_of_every_kind() -> None:
    for prompt in ("x", ["x", "y"], [1, 2], [[1], [2]]):
        found = CompletionRequest(prompt=prompt).prompt
        assert (found if isinstance(found, str) else [x if isinstance(x, str) else x.tolist() for x in found]) == prompt


def test_a_prompt_counts_once_however_many_samples_it_has() -> None:
    metas = [
        {"prompt_tokens": p, "completion_tokens": c, "cached_tokens": 1} for p, c in ((5, 2), (5, 3), (7, 1), (7, 1))
    ]
    usage = usage_of([{"meta_info": meta} for meta in metas], num_samples=2)
    assert usage["prompt_tokens"] == 12 and usage["completion_tokens"] == 7 and usage["total_tokens"] == 19
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}


def test_an_error_names_its_field() -> None:
    assert error_body("stop: must not be empty", 400)["error"]["param"] == "stop"
    assert error_body("routed_experts_start_len=7 is higher", 400)["error"]["param"] == "routed_experts_start_len"
    assert error_body("the prompt is empty: no", 400)["error"]["param"] is None
    assert error_body("prefill: the other side has died", 500)["error"]["param"] is None, "no field of a request"
