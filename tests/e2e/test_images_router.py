"""Images over HTTP through the router, to an engine for prompts and one for what follows that have one encoder."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.encoder_process import SECRET, VARIABLE, EncoderProcess, run_encoder
from support.engine_pair import free_port
from support.route_process import run_router
from support.server_process import ServerProcess
from support.tiny_families import write_family
from support.tiny_images import data_uri, make_png

# A grid of 3 x 5 tokens.
IMAGE = data_uri(make_png(40, 24, 0))
PART = {"type": "image_url", "image_url": {"url": IMAGE}}
MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "what is "}, PART, {"type": "text", "text": "?"}]}]
FIELDS = {"model": "m", "temperature": 0, "max_tokens": 5, "ignore_eos": True, "return_routed_experts": True}
CHAT = {"messages": MESSAGES, "logprobs": True, **FIELDS}
GENERATE = {
    "input_ids": [1, 2, 261, 262, 263, 3],
    "image_data": IMAGE,
    "sampling_params": {"temperature": 0, "max_new_tokens": 5, "ignore_eos": True},
    "return_routed_experts": True,
    "return_logprob": True,
    "logprob_start_len": 0,
}
BOUND_S = 10.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family("qwen3_vl_moe", tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> Iterator[EncoderProcess]:
    with run_encoder(checkpoint) as running:
        yield running


@pytest.fixture(scope="module")
def sides(checkpoint: Path, encoder: EncoderProcess) -> Iterator[tuple[httpx.Client, httpx.Client, httpx.Client]]:
    """Clients of the router, and of both sides. Their cache would show in what a request that comes again is told."""
    port, environment = free_port(), os.environ | {VARIABLE: SECRET, "OMP_NUM_THREADS": "1"}
    options = ["--model", str(checkpoint), "--device", "cpu", "--tp", "1", "--kv-cache-tokens", "2048"]
    options += ["--context-length", "256", "--dtype", "float32", "--disable-prefix-cache"]
    options += [
        "--encoder",
        encoder.place,
        "--enable-return-routed-experts",
        "--disaggregation-bootstrap-port",
        str(port),
    ]
    with ThreadPoolExecutor() as threads:
        starts = [
            threads.submit(ServerProcess, *options, "--disaggregation", side, environment=environment)
            for side in ("prefill", "decode")
        ]
        servers = [each.result() for each in starts]
    urls = [server.url for server in servers]
    with run_router(*urls, port) as url:
        clients = [httpx.Client(base_url=each, timeout=60) for each in (url, *urls)]
        yield clients[0], clients[1], clients[2]
        for client in clients:
            client.close()
    for server in servers:
        server.stop()


def at_rest(side: httpx.Client) -> None:
    until = time.monotonic() + BOUND_S
    while True:
        state = side.get("/server_info").json()
        if (
            state["num_running"]
            == state["num_waiting"]
            == state["num_transferring"]
            == state["num_images_encoding"]
            == 0
        ):
            assert state["num_free_pages"] == state["num_pages"]
            return
        names = ("num_running", "num_waiting", "num_transferring", "num_images_encoding")
        assert time.monotonic() < until, f"does not come to rest: { ({name: state[name] for name in names}) }"
        time.sleep(0.05)


def told(path: str, body: dict[str, Any], client: httpx.Client) -> Any:
    """An answer without what each request has of its own."""
    reply = client.post(path, json=body)
    assert reply.status_code == httpx.codes.OK, reply.text
    answer = reply.json()
    for name in ("id", "created"):
        answer.pop(name, None)
    for name in ("id", "e2e_latency"):
        answer.get("meta_info", {}).pop(name, None)
    return answer


def test_answers_are_those_of_one_server(sides: tuple[httpx.Client, httpx.Client, httpx.Client]) -> None:
    router, prefill, decode = sides
    num_transfers = decode.get("/server_info").json()["num_transfers"]
    for path, body in (("/v1/chat/completions", CHAT), ("/generate", GENERATE)):
        assert told(path, body, router) == told(path, body, prefill)
    assert decode.get("/server_info").json()["num_transfers"] == num_transfers + 2
    events = router.post("/v1/chat/completions", json=CHAT | {"stream": True}).text.split("\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events if event.startswith("data: {")]
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    whole = told("/v1/chat/completions", CHAT, prefill)
    assert text == whole["choices"][0]["message"]["content"]
    assert [chunk["sglext"] for chunk in chunks if "sglext" in chunk] == [whole["sglext"]]
    for side in (prefill, decode):
        at_rest(side)


def test_refusals_are_those_of_one_server(sides: tuple[httpx.Client, httpx.Client, httpx.Client]) -> None:
    router, prefill, decode = sides
    broken = {"image_data": data_uri(b"no image")}
    for more in (broken, {"image_data": [IMAGE, IMAGE]}, {"image_data": "/etc/passwd"}, broken | {"stream": True}):
        replies = [client.post("/generate", json=GENERATE | more) for client in (router, prefill)]
        # Streams are told in band.
        assert [reply.status_code for reply in replies] == [200 if "stream" in more else 400] * 2
        assert replies[0].text == replies[1].text and "image_data" in replies[0].text
    for side in (prefill, decode):
        at_rest(side)


def test_an_encoder_that_is_gone(
    sides: tuple[httpx.Client, httpx.Client, httpx.Client], encoder: EncoderProcess
) -> None:
    """Last. What both have of images is enough; where one has an image and the other has not, the answer is the refusal."""
    router, prefill, decode = sides
    known = data_uri(make_png(24, 40, 2))
    told("/generate", GENERATE | {"image_data": known}, decode)
    encoder.close()
    began = time.monotonic()
    for more in ({}, {"stream": True}):
        reply = router.post("/generate", json=GENERATE | {"image_data": known} | more)
        assert reply.status_code == 503 and encoder.place in reply.text, reply.text
        reply = router.post("/generate", json=GENERATE | {"image_data": data_uri(make_png(24, 24, 3))} | more)
        assert reply.status_code == 503 and encoder.place in reply.text
    assert time.monotonic() - began < BOUND_S
    assert router.post("/generate", json=GENERATE).status_code == httpx.codes.OK
    for side in (prefill, decode):
        at_rest(side)
