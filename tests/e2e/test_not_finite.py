"""Weights with NaN in running engines and a running server: the requests that meet it fail, each with the reason; others,
and the service, do not notice."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.server_process import ServerProcess

from waybill import Engine, GenerationError
from waybill.client import Client, ServerError
from waybill.engine.runner.sampler import MIN_LOGPROB

GREEDY = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}
PROMPTS = [list(text.encode()) for text in ("start with 12", "a longer prompt, add 30", "x", "add 21", "what now, 7?")]
# Of the seven layers the first is dense.
LAYER, MOE_LAYER = 4, 3
NAN = float("nan")
FLUSH_SHOWS_S = 30.0

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def weights(checkpoint: str) -> Tensors:
    return load_file(f"{checkpoint}/model.safetensors")


LAYOUTS = [{"tp_size": 2, "overlap_depth": 1}, {"tp_size": 1, "dp_size": 2, "overlap_depth": 0}]


@pytest.fixture(scope="module", params=LAYOUTS, ids=["tp 2", "dp 2"])
def engine(request: pytest.FixtureRequest, checkpoint: str) -> Iterator[Engine]:
    options = {"dtype": "float32", "enable_return_routed_experts": True, "page_size": 4, "chunked_prefill_size": 8}
    with Engine(checkpoint, kv_cache_tokens=8192, **options, **request.param) as engine:
        yield engine


def generate(engine: Engine, **fields: Any) -> list[Any]:
    given = {"input_ids": PROMPTS, "sampling_params": GREEDY, "return_routed_experts": True, **fields}
    answers: list[Any] = engine.generate(**given)
    return answers


def tell(answer: Any) -> str:
    """What must be the same, byte for byte."""
    meta = answer["meta_info"]
    return json.dumps([answer["output_ids"], meta["routed_experts"].tolist()])


def assert_rests(engine: Engine) -> None:
    engine.flush_cache()
    # Rank 0 answers for all; what another says of itself may be from the moment before.
    deadline = time.monotonic() + FLUSH_SHOWS_S
    while (info := engine.get_server_info())["num_free_pages"] != info["num_pages"]:
        assert time.monotonic() < deadline, info


def reason_of(answer: Any) -> Any:
    return answer["meta_info"]["finish_reason"]


def spoilt_expert(expert: int) -> str:
    return f"model.layers.{LAYER}.mlp.experts.{expert}.down_proj.weight"


def test_only_requests_that_meet_the_nan_fail(engine: Engine, weights: Tensors) -> None:
    """One expert of one layer has NaN weights. A request fails at the first position that goes there, whether that is in
    its prompt or was sampled; the others give the same tokens and routes, also from the cache shared with the failed."""
    before = generate(engine)
    rows = [answer["meta_info"]["routed_experts"][:, MOE_LAYER] for answer in before]
    # An expert that some meet in their prompt, some later, some never.
    firsts = {
        expert: [next((p for p, ids in enumerate(own) if expert in ids), None) for own in rows] for expert in range(8)
    }
    kinds = {
        expert: {"never" if p is None else p < len(prompt) for p, prompt in zip(found, PROMPTS, strict=True)}
        for expert, found in firsts.items()
    }
    expert = max(kinds, key=lambda e: len(kinds[e]))
    assert "never" in kinds[expert] and len(kinds[expert]) > 1, kinds
    name = spoilt_expert(expert)
    engine.update_weights_from_tensor({name: torch.full_like(weights[name], NAN)}, is_last=True)
    for answers in (generate(engine), generate(engine)):
        for answer, good, prompt, first in zip(answers, before, PROMPTS, firsts[expert], strict=True):
            if first is None:
                assert tell(answer) == tell(good)
                continue
            reason = reason_of(answer)
            assert (reason["type"], reason["status_code"]) == ("abort", 500)
            assert "not finite" in reason["message"]
            num_sampled = max(0, first - len(prompt) + 1)
            assert answer["output_ids"] == good["output_ids"][:num_sampled]
            found = answer["meta_info"]["routed_experts"]
            assert found is not None, answer["meta_info"]["routed_experts_error"]
            assert found.tolist() == good["meta_info"]["routed_experts"][: len(found)].tolist()
    # The pages that were cached meanwhile are whole: with good weights nobody fails on them.
    engine.update_weights_from_tensor({name: weights[name]}, is_last=True, flush_cache=False)
    after = generate(engine)
    assert any(answer["meta_info"]["cached_tokens"] for answer in after)
    assert [reason_of(answer)["type"] for answer in after] == ["length"] * len(PROMPTS)
    assert [answer["output_ids"] for answer in after] == [answer["output_ids"] for answer in before]
    assert_rests(engine)


def test_all_fail_and_then_all_is_well(engine: Engine, weights: Tensors) -> None:
    """Each way of asking has its error; the log-probabilities and long prompts too; then the good weights come back."""
    before = [tell(answer) for answer in generate(engine)]
    name = "model.norm.weight"
    engine.update_weights_from_tensor({name: torch.full_like(weights[name], NAN)}, is_last=True)
    with pytest.raises(GenerationError, match="not finite"):
        engine.generate(input_ids=PROMPTS[0], sampling_params=GREEDY)
    ways: list[dict[str, Any]] = [
        {},
        {"sampling_params": {"temperature": 1.0, "top_k": 5, "min_new_tokens": 1, "n": 2}, "return_logprob": True},
        {
            "sampling_params": {"max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": 2,
        },
        {"sampling_params": {"max_new_tokens": 0}},
        {"sampling_params": {"repetition_penalty": 1.5, "top_p": 0.5}},
    ]
    for way in ways:
        for answer in generate(engine, **way):
            assert reason_of(answer)["status_code"] == 500
            assert answer["output_ids"] == []
    *_, last = engine.generate(input_ids=PROMPTS[0], sampling_params=GREEDY, stream=True)
    assert reason_of(last)["status_code"] == 500
    engine.update_weights_from_tensor({name: weights[name]}, is_last=True)
    engine.flush_cache()
    assert [tell(answer) for answer in generate(engine)] == before
    assert_rests(engine)


# --- over HTTP --------------------------------------------------------------------------------------------------------


def post(http: httpx.Client, path: str, **body: Any) -> httpx.Response:
    return http.post(path, json=body)


@contextmanager
def nan_weights(http: httpx.Client, checkpoint: str, folder: Path, names: list[str]) -> Iterator[None]:
    """The server with NaN in these tensors, and after it with those that it began with."""
    tensors = load_file(f"{checkpoint}/model.safetensors")
    for name in names:
        tensors[name] = torch.full_like(tensors[name], NAN)
    spoilt = folder / "spoilt"
    shutil.copytree(checkpoint, spoilt)
    save_file(tensors, spoilt / "model.safetensors")
    reply = post(http, "/update_weights_from_disk", model_path=str(spoilt), weight_version="spoilt")
    assert reply.status_code == 200, reply.text
    try:
        yield
    finally:
        reply = post(http, "/update_weights_from_disk", model_path=checkpoint, weight_version="default")
        assert reply.status_code == 200, reply.text


def events(http: httpx.Client, path: str, **body: Any) -> list[Any]:
    with http.stream("POST", path, json={"stream": True, **body}) as reply:
        assert reply.status_code == 200
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_temperature_beyond_the_range_is_refused(http: httpx.Client) -> None:
    """A request that once ended all ranks, and its like."""
    ways = ({}, {"top_k": 5, "min_new_tokens": 1}, {"top_p": 0.5})
    for way in ways:
        reply = post(http, "/generate", text="a", sampling_params={"temperature": 1e39, **way}, return_logprob=True)
        assert reply.status_code == 400
        message = reply.json()["error"]["message"]
        assert "temperature" in message and "0 .. 1e+06" in message
    reply = post(http, "/v1/completions", prompt="a", temperature=1e39, min_tokens=1, top_k=5)
    assert reply.status_code == 400 and "temperature" in reply.json()["error"]["message"]
    for way in ways:
        reply = post(http, "/generate", text="a", sampling_params={"temperature": 1e6, "max_new_tokens": 4, **way})
        assert reply.status_code == 200
        assert reply.json()["meta_info"]["finish_reason"]["type"] in ("stop", "length")


def test_probability_zero_is_a_number_in_json(http: httpx.Client) -> None:
    """The bias makes likely what the model deems all but impossible; no log-probability is null."""
    params = {**GREEDY, "logit_bias": {"3": 1e30}}
    answer = post(http, "/generate", text="a", sampling_params=params, return_logprob=True, top_logprobs_num=100).json()
    meta = answer["meta_info"]
    values = [entry[0] for entries in meta["output_top_logprobs"] for entry in entries]
    values += [entry[0] for entry in meta["output_token_logprobs"]]
    assert all(isinstance(value, float) and value >= MIN_LOGPROB for value in values)


def test_how_a_failure_looks_over_http(
    server: ServerProcess, http: httpx.Client, checkpoint: str, tmp_path: Path
) -> None:
    ask: dict[str, Any] = {"text": "start with 12", "sampling_params": GREEDY}
    good = post(http, "/generate", **ask).json()["output_ids"]
    num_lines = len(server.lines)
    with nan_weights(http, checkpoint, tmp_path, ["model.norm.weight"]):
        reply = post(http, "/generate", **ask, rid="the-one")
        assert reply.status_code == 500
        assert reply.json()["error"]["type"] == "InternalServerError"
        assert "not finite" in reply.json()["error"]["message"]
        for body in ({"text": ["a", "b"]}, {"text": "a", "sampling_params": {"n": 2}}):
            reply = post(http, "/generate", **body)
            assert reply.status_code == 200
            assert [answer["meta_info"]["finish_reason"]["status_code"] for answer in reply.json()] == [500, 500]
        assert events(http, "/generate", **ask)[-1]["meta_info"]["finish_reason"]["status_code"] == 500
        failure_over_openai(server, http)
        with Client(server.url) as client, pytest.raises(ServerError, match="not finite"):
            client.generate(text="a", sampling_params=GREEDY)
        assert http.get("/health").status_code == 200
    assert post(http, "/generate", **ask).json()["output_ids"] == good
    assert 'waybill_requests_total{outcome="failed"}' in http.get("/metrics").text
    info = http.get("/get_server_info").json()
    assert info["num_free_pages"] + info["num_cached_pages"] == info["num_pages"]
    log = "\n".join(server.lines[num_lines:])
    assert "Traceback" not in log
    assert any("the-one" in line and "failed" in line for line in log.splitlines())


def failure_over_openai(server: ServerProcess, http: httpx.Client) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    for path, body in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", chat)):
        reply = post(http, path, **body)
        assert reply.status_code == 500 and "not finite" in reply.json()["error"]["message"]
        reply = post(http, path, **body, n=2)
        assert reply.status_code == 200
        for choice in reply.json()["choices"]:
            assert choice["finish_reason"] == "abort" and choice["error"]["code"] == 500
        assert events(http, path, **body)[-1]["error"]["code"] == 500
        chunks = events(http, path, **body, n=2, stream_options={"include_usage": True})
        failed = [chunk["choices"][0] for chunk in chunks if chunk["choices"] and "error" in chunk["choices"][0]]
        assert sorted(choice["index"] for choice in failed) == [0, 1]
        assert chunks[-1]["usage"]
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model="any", prompt="a")
    with pytest.raises(openai.APIError, match="not finite"):
        list(client.completions.create(model="any", prompt="a", stream=True))
