"""The real `openai` package against the server."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import numpy as np
import openai
import pytest
from support.field_decoder import decode_routed_experts, merge
from support.server_process import ServerProcess

from waybill.client.turn_ids import next_turn_ids

NUM_LAYERS, TOP_K = 7, 4
MESSAGES: list[Any] = [{"role": "user", "content": "start with 12"}]


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def rows(sglext: Any, usage: Any, start: int = 0) -> np.ndarray:
    return decode_routed_experts(sglext["routed_experts"], usage.total_tokens, start, NUM_LAYERS, TOP_K)


def test_a_chat_turn(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0)
    assert answer.choices[0].message.content == "12"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.completion_tokens == 3
    assert not hasattr(answer, "sglext"), "nobody opted in"


def test_a_chat_stream_says_the_same_with_usage_and_routes(client: openai.OpenAI) -> None:
    extra = {"return_routed_experts": True, "return_router_weights": True}
    # From here on the prompt is cached: all that follow compute the same steps.
    client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0)
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, extra_body=extra)
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=extra,
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [bool(chunk.choices) for chunk in chunks[-2:]] == [False, False]
    assert chunks[-2].sglext == whole.sglext
    weights = np.frombuffer(base64.b64decode(whole.sglext["router_weights"]), "<f4")
    assert whole.sglext["router_weights_meta"]["dtype"] == "float32"
    assert len(weights) == (whole.usage.total_tokens - 1) * (NUM_LAYERS - 1) * TOP_K
    in_vllm_s_form = {"routed_experts_prompt_start": 0, "return_router_weights": True}
    with pytest.raises(openai.BadRequestError, match="must be absent beside return_router_weights"):
        client.completions.create(model="tiny", prompt="a", extra_body=in_vllm_s_form)
    assert chunks[-1].usage == whole.usage
    assert len(rows(whole.sglext, whole.usage)) == whole.usage.total_tokens - 1


def test_ten_chat_turns_by_tokens_merge_to_one_answer(client: openai.OpenAI) -> None:
    """Token in, token out: ids of a conversation only grow; `input_ids` are the prompt."""
    tokens: list[int] = []
    routes: np.ndarray | None = None
    for turn in range(10):
        prompt = tokens + list(f"<{turn}> add {turn}".encode())
        start = max(0, len(tokens) - 1)
        answer = client.chat.completions.create(
            model="tiny",
            messages=[],
            max_tokens=5,
            temperature=0,
            extra_body={
                "input_ids": prompt,
                "return_routed_experts": True,
                "routed_experts_start_len": start,
                "return_meta_info": True,
                "ignore_eos": True,
            },
        )
        routes = merge(routes, start, rows(answer.sglext, answer.usage, start))
        meta = answer.choices[0].meta_info
        assert meta["routed_experts"] == answer.sglext["routed_experts"]
        tokens = prompt + meta["output_ids"]
    full = client.completions.create(
        model="tiny", prompt=tokens, max_tokens=0, extra_body={"return_routed_experts": True}
    )
    assert routes is not None and rows(full.sglext, full.usage).tobytes() == routes.tobytes()


def test_samples_each_have_their_routes(client: openai.OpenAI) -> None:
    extra = {"return_routed_experts": True, "ignore_eos": True}
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, n=3, max_tokens=4, seed=5, extra_body=extra
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.sglext["routed_experts"] == answer.choices[0].sglext["routed_experts"]
    num_tokens = answer.usage.prompt_tokens + 4
    for choice in answer.choices:
        decode_routed_experts(choice.sglext["routed_experts"], num_tokens, 0, NUM_LAYERS, TOP_K)


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, logprobs=True, top_logprobs=2
    )
    content = answer.choices[0].logprobs.content
    assert [entry.token for entry in content] == ["1", "2", "<|end|>"]
    assert all(entry.logprob == entry.top_logprobs[0].logprob and len(entry.top_logprobs) == 2 for entry in content)


def test_completions_whole_streamed_and_echoed(client: openai.OpenAI) -> None:
    fields: Any = {"model": "tiny", "prompt": ["<|user|>start with 12<|assistant|>", "abc"], "temperature": 0}
    whole = client.completions.create(**fields, max_tokens=3)
    assert whole.choices[0].text == "12" and len(whole.choices) == 2
    texts = ["", ""]
    for chunk in client.completions.create(**fields, max_tokens=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]
    echoed = client.completions.create(
        **{**fields, "prompt": "abc"}, max_tokens=2, echo=True, logprobs=2, extra_body={"ignore_eos": True}
    )
    assert echoed.choices[0].text.startswith("abc")
    logprobs = echoed.choices[0].logprobs
    assert logprobs.tokens[:3] == ["a", "b", "c"] and logprobs.token_logprobs[0] is None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 5


FIELDS_OF_LOGPROBS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def test_echoed_logprobs_are_the_same_streamed_and_whole(client: openai.OpenAI) -> None:
    """A prompt of ids, with a special token, half a character, and an id that the tokenizer does not have."""
    prompt = [258, *b"ab\xe4\xbd", 263, *b"c"]
    fields: Any = {"model": "tiny", "prompt": prompt, "max_tokens": 4, "echo": True, "logprobs": 3, "temperature": 0}
    extra = {"ignore_eos": True}
    whole = client.completions.create(**fields, extra_body=extra).choices[0]
    text, parts = "", []
    for chunk in client.completions.create(**fields, stream=True, extra_body=extra):
        text += chunk.choices[0].text
        parts.append(chunk.choices[0].logprobs)
    assert text == whole.text and text.startswith("<|user|>ab\ufffdc")
    assert whole.logprobs.tokens[:4] == ["<|user|>", "a", "b", "bytes:\\xe4"]
    told = {name: [one for part in parts for one in getattr(part, name) or []] for name in FIELDS_OF_LOGPROBS}
    assert {len(entries) for entries in told.values()} == {len(prompt) + 4}
    assert told["tokens"] == whole.logprobs.tokens and told["text_offset"] == whole.logprobs.text_offset
    # Two runs of a prompt may differ in the last bits of a number.
    assert told["token_logprobs"][1:] == pytest.approx(whole.logprobs.token_logprobs[1:], abs=1e-4)
    assert [top and sorted(top) for top in told["top_logprobs"]] == [
        top and sorted(top) for top in whole.logprobs.top_logprobs
    ]
    assert whole.logprobs.text_offset == sorted(whole.logprobs.text_offset)
    assert whole.logprobs.text_offset[len(prompt)] == len("<|user|>ab\ufffdc")


def test_a_special_token_as_stop_string(client: openai.OpenAI) -> None:
    """Which ends this answer, and is no text."""
    fields: Any = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "stop": ["<|end|>", "zzz"]}
    answer = client.chat.completions.create(**fields, extra_body={"ignore_eos": True})
    assert answer.choices[0].message.content == "12" and answer.choices[0].matched_stop == "<|end|>"
    chunks = client.chat.completions.create(**fields, stream=True, extra_body={"ignore_eos": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "12"


def test_stop_strings(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, stop=["2"])
    assert answer.choices[0].message.content == "1"
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"extra_body": {"return_routed_experts": True, "routed_experts_start_len": 999}}, "is higher than the number"),
        ({"extra_body": {"colour": "red"}}, "colour"),
        ({"max_tokens": 10**6}, "context_length"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name"),
        ({"response_format": {"type": "json"}}, "response_format.type: "),
        ({"top_logprobs": 3}, "top_logprobs: needs logprobs=true"),
        ({"temperature": -1}, "temperature"),
    ],
)
def test_refusals_have_openais_form(client: openai.OpenAI, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as refusal:
        client.chat.completions.create(model="tiny", messages=MESSAGES, **fields)
    assert refusal.value.status_code == 400 and refusal.value.type == "BadRequestError"


def test_a_refused_stream_raises_in_band(client: openai.OpenAI) -> None:
    extra = {"return_routed_experts": True, "routed_experts_start_len": 999}
    with pytest.raises(openai.APIError, match="is higher than the number of input tokens"):
        list(client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True, extra_body=extra))


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["checkpoint"]


POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "name": {"enum": ["a", "bc"]}},
    "required": ["x", "name"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "mark", "description": "marks", "parameters": POINT}}]
# The model was not trained on JSON, and likes the spaces that a schema allows; digits make it end.
HURRY = {"temperature": 0.7, "logit_bias": {str(byte): -100 for byte in b" \t\n\r"}, "max_tokens": 100}


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_of_its_schema(client: openai.OpenAI, stream: bool) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "point", "schema": POINT, "strict": True}}
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": MESSAGES,
        "response_format": form,
        "n": 2,
        "logprobs": True,
        **HURRY,
    }
    if stream:
        texts = ["", ""]
        for chunk in client.chat.completions.create(stream=True, **asked):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
    else:
        answer = client.chat.completions.create(**asked)
        texts = [choice.message.content or "" for choice in answer.choices]
        assert {choice.finish_reason for choice in answer.choices} == {"stop"}
        # Where the schema leaves one token its probability is 1: that of the distribution that is sampled from.
        first = answer.choices[0].logprobs.content[0]
        assert (first.token, first.logprob) == ("{", 0.0)
    for text in texts:
        jsonschema.validate(json.loads(text), POINT)


def test_grammars_of_the_native_dialect_and_bad_ones(server: ServerProcess, client: openai.OpenAI) -> None:
    params = {"temperature": 1.0, "max_new_tokens": 20}
    body = {
        "text": ["start with 12"] * 3,
        "sampling_params": [{**params, "regex": "ab[0-9]{3}"}, {**params, "ebnf": 'root ::= "yes" | "no"'}, params],
    }
    answers = httpx.post(f"{server.url}/generate", json=body).json()
    assert re.fullmatch("ab[0-9]{3}", answers[0]["text"]) and answers[1]["text"] in ("yes", "no")
    refused = httpx.post(
        f"{server.url}/generate", json={"text": "a", "sampling_params": {"json_schema": '{"not": {}}'}}
    )
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "json_schema"


@pytest.mark.matrix
def test_a_schema_that_never_compiles_is_refused_by_its_bound(client: openai.OpenAI) -> None:
    runaway = {"allOf": [{"type": "string", "pattern": f"^.*a{i}.*$"} for i in range(30)]}
    form: Any = {"type": "json_schema", "json_schema": {"name": "p", "schema": runaway}}
    with pytest.raises(openai.BadRequestError, match="response_format: takes more than 4 s of processor time"):
        client.chat.completions.create(model="tiny", messages=MESSAGES, response_format=form)


def test_a_required_call_and_the_turn_after_it(client: openai.OpenAI) -> None:
    choice: Any = {"type": "function", "function": {"name": "mark"}}
    asked: dict[str, Any] = {"model": "tiny", "tools": TOOLS, **HURRY}
    answer = client.chat.completions.create(messages=MESSAGES, tool_choice=choice, **asked)
    assert answer.choices[0].finish_reason == "tool_calls"
    message = answer.choices[0].message
    assert message.tool_calls is not None and message.tool_calls[0].function.name == "mark"
    jsonschema.validate(json.loads(message.tool_calls[0].function.arguments), POINT)
    history = [*MESSAGES, message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "done"}]
    again = client.chat.completions.create(messages=history, **asked)
    assert again.choices[0].message.content is not None
    names, arguments = [], ""
    for chunk in client.chat.completions.create(messages=MESSAGES, tool_choice="required", stream=True, **asked):
        for call in chunk.choices[0].delta.tool_calls or []:
            names += [call.function.name] if call.function.name else []
            arguments += call.function.arguments or ""
            last = call.index
    assert len(names) == last + 1 and set(names) == {"mark"} and json.loads(arguments.split("}{")[0].rstrip("}") + "}")


def test_the_next_turn_is_built_of_what_was_sampled(server: ServerProcess, client: openai.OpenAI) -> None:
    def tokenized(messages: list[Any], **fields: Any) -> list[int]:
        return httpx.post(f"{server.url}/tokenize", json={"messages": messages, **fields}).json()["tokens"]

    extra = {"return_token_ids": True}
    answer: Any = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, extra_body=extra)
    assert answer.prompt_token_ids == tokenized(MESSAGES)
    history = [*MESSAGES, {"role": "assistant", "content": answer.choices[0].message.content}]
    asked = [*history, {"role": "user", "content": "add 2"}]
    turn = next_turn_ids(
        answer.prompt_token_ids,
        answer.choices[0].token_ids,
        tokenized(history, add_generation_prompt=False),
        tokenized(asked),
        is_cut=False,
    )
    assert turn.drift is None and turn.input_ids == tokenized(asked)
    extra = {"add_generation_prompt": False, "continue_final_message": True}
    begun: list[Any] = [*MESSAGES, {"role": "assistant", "content": "1"}]
    rest = client.chat.completions.create(model="tiny", messages=begun, temperature=0, extra_body=extra)
    assert rest.choices[0].message.content == "2", "it goes on with what was begun"
