"""sglang's router as it is published, before an engine for prompts and one for what follows, by its dialect of rooms."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from support.engine_pair import free_port
from support.server_process import ServerProcess
from support.sglang_router import run_sglang_router

from waybill.launch.node_options import RUN_SECRET_VARIABLE

OPTIONS = ("--tp", "1", "--num-threads", "1", "--enable-return-routed-experts", "--kv-cache-tokens", "8192")
PROMPT = "a prompt of another engine, which takes more than one chunk. " * 3
PARAMS = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
BODY = {"text": PROMPT, "sampling_params": PARAMS}
SCORED = BODY | {"return_logprob": True, "logprob_start_len": 0}
REST_S = 20.0


@pytest.fixture(scope="module")
def sides() -> Iterator[tuple[ServerProcess, ServerProcess, int]]:
    port, environment = free_port(), os.environ | {RUN_SECRET_VARIABLE: "a secret of both sides"}
    bootstrap = ("--disaggregation-bootstrap-port", str(port), "--chunked-prefill-size", "64")
    prefill = ServerProcess(*OPTIONS, "--disaggregation", "prefill", *bootstrap, environment=environment)
    try:
        decode = ServerProcess(*OPTIONS, "--disaggregation", "decode", environment=environment)
        yield prefill, decode, port
        decode.stop()
    finally:
        prefill.stop()


@pytest.fixture(scope="module")
def router(sides: tuple[ServerProcess, ServerProcess, int]) -> Iterator[httpx.Client]:
    prefill, decode, port = sides
    options = ("--pd-disaggregation", "--prefill", prefill.url, str(port), "--decode", decode.url)
    with run_sglang_router(*options) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def at_rest(side: ServerProcess) -> dict[str, Any]:
    until = time.monotonic() + REST_S
    while time.monotonic() < until:
        state: dict[str, Any] = httpx.get(f"{side.url}/server_info", timeout=60).json()
        if state["num_running"] == state["num_waiting"] == state["num_transferring"] == 0:
            assert state["num_free_pages"] + state["num_cached_pages"] == state["num_pages"]
            return state
        time.sleep(0.05)
    raise AssertionError("the engine does not come to rest")


def check_logprobs(found: list[Any], expected: list[Any]) -> None:
    """The router reads numbers and writes them again, less exactly."""
    assert [each[1:] for each in found] == [each[1:] for each in expected]
    # The first token of a prompt has none.
    assert [each[0] or 0.0 for each in found] == pytest.approx([each[0] or 0.0 for each in expected], rel=1e-12)


def test_answers_are_those_of_one_engine(router: httpx.Client, sides: tuple[ServerProcess, ServerProcess, int]) -> None:
    prefill, decode, _ = sides
    # The prefill's side alone is an engine, too.
    alone = httpx.post(f"{prefill.url}/generate", json=SCORED, timeout=60).json()
    before = at_rest(decode)["num_transfers"]

    def ask(_: int) -> Any:
        reply = router.post("/generate", json=BODY)
        assert reply.status_code == httpx.codes.OK, reply.text
        return reply.json()["output_ids"]

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(ask, range(8))) == [alone["output_ids"]] * 8
    scored = router.post("/generate", json=SCORED).json()
    assert scored["output_ids"] == alone["output_ids"]
    for name in ("input_token_logprobs", "output_token_logprobs"):
        assert len(alone["meta_info"][name]) > 5
        check_logprobs(scored["meta_info"][name], alone["meta_info"][name])
    # A list of texts is nothing that it takes.
    prompts = [list(PROMPT.encode()), list(b"another")]
    batch = router.post("/generate", json={"input_ids": prompts, "sampling_params": PARAMS}).json()
    assert len(batch) == 2 and batch[0]["output_ids"] == alone["output_ids"]
    with router.stream("POST", "/generate", json=BODY | {"stream": True}) as stream:
        lines = [line for line in stream.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and len(lines) > 1
    for side in (prefill, decode):
        state = at_rest(side)
        assert state["num_transfers_failed"] == 0 and state["disaggregation_transports"] == ["shared"]
    assert at_rest(decode)["num_transfers"] == before + 8 + 1 + 2 + 1


def test_openai(router: httpx.Client, sides: tuple[ServerProcess, ServerProcess, int]) -> None:
    before = at_rest(sides[1])["num_transfers"]
    chat = {"model": "tiny_moe", "messages": [{"role": "user", "content": "start with 12"}], "temperature": 0}
    assert router.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]["content"] == "12"
    with router.stream("POST", "/v1/chat/completions", json=chat | {"stream": True}) as stream:
        lines = [line for line in stream.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and len(lines) > 2
    completion = {"model": "tiny_moe", "prompt": "<|user|>start with 12<|assistant|>", "temperature": 0}
    assert router.post("/v1/completions", json=completion).json()["choices"][0]["text"] == "12"
    assert at_rest(sides[1])["num_transfers"] == before + 3


def test_what_is_refused_and_who_leaves(router: httpx.Client, sides: tuple[ServerProcess, ServerProcess, int]) -> None:
    refused = router.post("/generate", json={"text": PROMPT, "sampling_params": {"temperature": -1}})
    assert refused.status_code == httpx.codes.BAD_REQUEST and "temperature" in refused.text
    with router.stream(
        "POST", "/generate", json={**BODY, "sampling_params": {**PARAMS, "max_new_tokens": 2000}} | {"stream": True}
    ) as left:
        next(left.iter_lines())
    for side in sides[:2]:
        at_rest(side)
