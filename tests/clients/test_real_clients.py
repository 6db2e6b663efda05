"""Clients as their makers publish them, against a real server: what they send is taken, and what they read is there."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import litellm
import numpy as np
import pytest
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from openai import OpenAI
from strands_sglang import SGLangClient, SGLangModel
from support.server_process import ServerProcess
from support.sglang_router import run_sglang_router
from transformers import AutoTokenizer
from trl.generation import vllm_client

CHECKPOINT = Path(__file__).parents[2] / "examples" / "tiny_moe" / "checkpoint"
During = Callable[[Callable[[], Any]], Any]
QUESTION = "start with 12"
ANSWER = "12"
MESSAGES = [{"role": "user", "content": QUESTION}]
# A dense layer is zeros in this form.
NUM_LAYERS, TOP_K = 7, 4


def rows_of(encoded: str) -> np.ndarray:
    rows = np.frombuffer(base64.b64decode(encoded), np.int32)
    return rows.reshape(-1, NUM_LAYERS, TOP_K)


def test_openai(server: ServerProcess, during_update: During) -> None:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

    def ask_openai() -> Any:
        return client.chat.completions.create(
            model="tiny_moe",
            messages=MESSAGES,
            temperature=0,
            logprobs=True,
            extra_body={"return_routed_experts": True},
        )

    answer = during_update(ask_openai)
    assert answer.choices[0].message.content == ANSWER
    extension = answer.model_extra["sglext"]
    assert len(rows_of(extension["routed_experts"])) == answer.usage.total_tokens - 1
    stream = client.chat.completions.create(model="tiny_moe", messages=MESSAGES, temperature=0, stream=True)
    assert "".join(each.choices[0].delta.content or "" for each in stream if each.choices) == ANSWER


def test_litellm(server: ServerProcess, during_update: During) -> None:
    def ask_litellm() -> Any:
        return litellm.completion(
            model="openai/tiny_moe",
            api_base=f"{server.url}/v1",
            api_key="none",
            messages=MESSAGES,
            temperature=0,
            extra_body={"return_routed_experts": True},
        )

    answer = during_update(ask_litellm)
    assert answer.choices[0].message.content == ANSWER
    stream = litellm.completion(
        model="openai/tiny_moe",
        api_base=f"{server.url}/v1",
        api_key="none",
        messages=MESSAGES,
        temperature=0,
        stream=True,
    )
    assert "".join(each.choices[0].delta.content or "" for each in stream) == ANSWER


def test_langchain(server: ServerProcess, during_update: During) -> None:
    model = ChatOpenAI(model="tiny_moe", base_url=f"{server.url}/v1", api_key="none", temperature=0, max_retries=0)

    def ask_langchain() -> Any:
        return model.invoke([HumanMessage(QUESTION)])

    answer = during_update(ask_langchain)
    assert answer.content == ANSWER and answer.usage_metadata["output_tokens"] > 0
    assert "".join(str(each.content) for each in model.stream([HumanMessage(QUESTION)])) == ANSWER


def test_strands_sglang(server: ServerProcess, during_update: During) -> None:
    """Token in, token out, with log-probabilities and routes of the whole trajectory."""
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)

    async def turn() -> SGLangModel:
        async with SGLangClient(base_url=server.url) as client:
            model = SGLangModel(
                client=client,
                tokenizer=tokenizer,
                sampling_params={"temperature": 0.0, "max_new_tokens": 8},
                return_routed_experts=True,
            )
            async for _ in model.stream([{"role": "user", "content": [{"text": QUESTION}]}]):
                pass
            return model

    def ask_strands() -> SGLangModel:
        return asyncio.run(turn())

    model = during_update(ask_strands)
    rollout = model.rollout
    assert tokenizer.decode(rollout.token_ids).count(ANSWER) == 2
    assert sum(rollout.loss_mask) > 0 and len(rollout.logprobs) == len(rollout.token_ids)


def test_lm_eval(server: ServerProcess, during_update: During) -> None:
    """Log-likelihoods of answers, by those of the prompt: the right one is the likelier."""
    model = LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions",
        model="tiny_moe",
        tokenizer=str(CHECKPOINT),
        tokenizer_backend="huggingface",
        max_retries=1,
    )
    prompt = f"<|user|>{QUESTION}<|assistant|>"
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=(prompt, text), idx=i)
        for i, text in enumerate((ANSWER, "77"))
    ]

    def ask_lm_eval() -> Any:
        return model.loglikelihood(requests)

    (right, is_greedy), (wrong, _) = during_update(ask_lm_eval)
    assert is_greedy and wrong < right < 0


def test_trl(server: ServerProcess, during_update: During, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client of `vllm serve`, which asks for vLLM's package on the trainer's side, too, to send weights on GPUs."""
    monkeypatch.setattr(vllm_client, "is_vllm_available", lambda *_, **__: True)
    client = vllm_client.VLLMClient(server.url, connection_timeout=10.0)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    prompt = f"<|user|>{QUESTION}<|assistant|>"

    def ask_trl() -> Any:
        return client.generate([prompt, prompt], n=2, temperature=0.0, max_tokens=8, logprobs=1)

    found = during_update(ask_trl)
    assert found["prompt_ids"] == [tokenizer.encode(prompt)] * 2
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in found["completion_ids"]] == [ANSWER] * 4
    # The sampled token is the likeliest, which comes first.
    assert [[ids[0] for ids in each] for each in found["logprob_token_ids"]] == found["completion_ids"]
    assert client.chat([MESSAGES], temperature=0.0, max_tokens=8)["completion_ids"][0] == found["completion_ids"][0]
    number = client.generate([prompt], max_tokens=3, structured_outputs_regex="[0-9]{3}")["completion_ids"][0]
    assert tokenizer.decode(number).isdigit()
    sequence = found["prompt_ids"][0] + found["completion_ids"][0]
    scores = client.get_sequence_logprobs([sequence], [len(found["prompt_ids"][0])], top_logprobs=2)
    assert scores["actual_token_ids"][0] == [[token] for token in found["completion_ids"][0]]
    assert [ids[0] for ids in scores["logprob_token_ids"][0]] == found["completion_ids"][0]
    # Tokens that are not among the best are sorted with them, by rank.
    unlikely = client.get_sequence_logprobs([found["prompt_ids"][0]], [1], top_logprobs=1)
    assert len(unlikely["logprobs"][0]) == len(found["prompt_ids"][0]) - 1
    assert client.get_world_size() == 1
    client.reset_prefix_cache()
    with client.weight_update():
        pass
    with pytest.raises(RuntimeError, match="has no weight-transfer engine"):
        client.init_communicator("cpu")


@pytest.fixture
def router(server: ServerProcess, second_server: ServerProcess) -> Iterator[str]:
    with run_sglang_router("--worker-urls", server.url, second_server.url, "--policy", "round_robin") as url:
        yield url


def test_sglang_router(router: str, server: ServerProcess, second_server: ServerProcess) -> None:
    """In front of two servers; its published wheel drops what it does not know of routes, and says so nowhere."""
    body = {"text": f"<|user|>{QUESTION}<|assistant|>", "sampling_params": {"temperature": 0, "max_new_tokens": 8}}
    before = [num_finished(each) for each in (server, second_server)]
    with httpx.Client(base_url=router, timeout=60) as client:
        for _ in range(4):
            reply = client.post("/generate", json=body | {"return_routed_experts": True})
            assert reply.status_code == httpx.codes.OK, reply.text
            assert reply.json()["text"] == ANSWER
        chat = client.post("/v1/chat/completions", json={"model": "tiny_moe", "messages": MESSAGES, "temperature": 0})
        assert chat.json()["choices"][0]["message"]["content"] == ANSWER
        with client.stream("POST", "/generate", json=body | {"stream": True}) as stream:
            lines = [line for line in stream.iter_lines() if line]
        assert lines[-1] == "data: [DONE]" and len(lines) > 1
    after = [num_finished(each) for each in (server, second_server)]
    assert all(now > was for was, now in zip(before, after, strict=True)), "one server has answered nothing"


def num_finished(server: ServerProcess) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("waybill_requests_total"))
