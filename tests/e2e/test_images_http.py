"""Images over HTTP, and a server whose encoder dies, hangs and comes again."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
from support.encoder_process import SECRET, VARIABLE, run_encoder
from support.engine_pair import free_port
from support.hostile_bodies import Fuzzer, fault_of
from support.server_process import ServerProcess
from support.tiny_families import write_family
from support.tiny_images import data_uri, make_png

# Grids of 3 x 5 and 4 x 4 tokens.
FIRST, SECOND = data_uri(make_png(40, 24, 0)), data_uri(make_png(32, 32, 1))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family("qwen3_vl_moe", tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def encoder_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def http(checkpoint: Path, encoder_port: int) -> Iterator[httpx.Client]:
    options = ["--model", str(checkpoint), "--device", "cpu", "--kv-cache-tokens", "2048", "--context-length", "256"]
    options += ["--encoder", f"127.0.0.1:{encoder_port}", "--encoder-timeout", "6", "--enable-return-routed-experts"]
    environment = os.environ | {VARIABLE: SECRET, "OMP_NUM_THREADS": "1"}
    server = ServerProcess(*options, environment=environment)
    try:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            yield client
    finally:
        server.stop()


def chat(http: httpx.Client, *parts: Any, **fields: Any) -> httpx.Response:
    content = [
        {"type": "image_url", "image_url": {"url": part[0]}}
        if isinstance(part, tuple)
        else {"type": "text", "text": part}
        for part in parts
    ]
    body = {"model": "m", "messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": 0}
    return http.post("/v1/chat/completions", json={**body, "ignore_eos": True, **fields})


def test_a_service_with_its_encoder_and_without(http: httpx.Client, checkpoint: Path, encoder_port: int) -> None:
    with run_encoder(checkpoint, port=encoder_port) as encoder:
        reply = chat(
            http, "what is ", (FIRST,), " beside ", (SECOND,), "?", return_routed_experts=True, max_tokens=None
        )
        assert reply.status_code == 200, reply.text
        answer = reply.json()
        # Five ids around each of the images' own, as the template writes them, and the texts.
        num_prompt = answer["usage"]["prompt_tokens"]
        assert num_prompt == 1 + 8 + 17 + 8 + 18 + 1 + 1
        assert answer["sglext"]["routed_experts"]
        # Without a limit an answer may fill the context, behind all placeholders.
        assert num_prompt + answer["usage"]["completion_tokens"] == 256
        # Part of the same prompt, to the end of the first image.
        again = chat(http, "what is ", (FIRST,), " and nothing", return_meta_info=True).json()
        assert again["choices"][0]["meta_info"]["cached_tokens"] == 1 + 8 + 17 + 1
        assert http.get("/health").headers["X-Encoder"] == "up"
        for part in (("https://example.com/cat.png",), ("/etc/passwd",)):
            refused = chat(http, part)
            assert refused.status_code == 400 and "not fetched; give it as a data URI" in refused.text
            assert refused.json()["error"]["param"] == "image_url.0"
        assert chat(http, (FIRST[:60],)).status_code == 400
        hostile = [
            body for body in islice(Fuzzer(http.get("/openapi.json").json(), 17), 300) if b"image" in body.content
        ]
        assert len(hostile) > 20
        for body in hostile:
            reply = http.post(body.path, content=body.content, headers={"content-type": body.content_type})
            assert fault_of(reply) is None, f"{body}: {reply.status_code} {reply.text}"
        # The text of a placeholder is no image.
        assert "1 images for 2 places" in chat(http, "<|image_pad|> ", (FIRST,)).text
        hangs(http, encoder)
    died(http)
    with run_encoder(checkpoint, port=encoder_port):
        back = time.monotonic()
        # Until it is known, what the one before has made is answered with.
        while http.get("/health").headers["X-Encoder"] != "up":
            assert time.monotonic() - back < 30
            time.sleep(0.1)
        assert chat(http, (FIRST,)).status_code == 200
        # It may have other weights: nothing of its images is found.
        fresh = chat(http, "what is ", (FIRST,), " and nothing", return_meta_info=True).json()
        assert fresh["choices"][0]["meta_info"]["cached_tokens"] == 1 + 8 + 1
    state = http.get("/get_server_info").json()
    assert state["num_running"] == state["num_waiting"] == 0


def hangs(http: httpx.Client, encoder: Any) -> None:
    """Stopped: an image that is not known ends within the bound, or by an abort; one that is known, and text, go on."""
    encoder.stop(signal.SIGSTOP)
    began = time.monotonic()
    with ThreadPoolExecutor() as threads:
        waits = threads.submit(chat, http, (data_uri(make_png(24, 24, 5)),))
        whole = threads.submit(chat, http, (data_uri(make_png(24, 24, 8)),), rid="aborted")
        streamed = threads.submit(chat, http, (data_uri(make_png(24, 24, 7)),), rid="aborted too", stream=True)
        while http.get("/server_info").json()["num_images_encoding"] < 3:
            time.sleep(0.05)
        assert http.post("/abort_request", json={"rid": "aborted"}).status_code == 200
        for reply in (whole.result(), streamed.result()):
            assert reply.status_code == 200 and '"finish_reason":"abort"' in reply.text
        assert time.monotonic() - began < 5 and not waits.done()
        reply = waits.result()
    assert reply.status_code == 503 and f"encoder {encoder.place}" in reply.text and "--encoder-timeout" in reply.text
    assert time.monotonic() - began < 10
    assert chat(http, "no image").status_code == 200
    assert chat(http, (FIRST,)).status_code == 200
    encoder.stop(signal.SIGCONT)


def died(http: httpx.Client) -> None:
    deadline = time.monotonic() + 30
    while http.get("/health").headers["X-Encoder"] == "up":
        assert time.monotonic() < deadline
        time.sleep(0.5)
    began = time.monotonic()
    reply = chat(http, (data_uri(make_png(24, 24, 6)),))
    assert reply.status_code == 503 and "is gone" in reply.text
    assert time.monotonic() - began < 3
    assert chat(http, "no image").status_code == 200
    assert "waybill_encoder_up 0.0" in http.get("/metrics").text
    assert "is gone" in http.get("/server_info").json()["encoder_problem"]


@pytest.mark.matrix
def test_an_encoder_that_dies_or_stops_at_random(http: httpx.Client, checkpoint: Path, encoder_port: int) -> None:
    """Whatever becomes of it, an answer is the right one or says 503 within the bound, and nothing is left of it."""
    random = Random(3)
    images = [data_uri(make_png(24, 24, 100 + seed)) for seed in range(8)]
    fields = {"temperature": 0, "return_routed_experts": True, "max_tokens": 6}
    expected: dict[str, str] = {}
    told: Counter[int] = Counter()
    with ThreadPoolExecutor(len(images)) as threads:
        for _ in range(12):
            with run_encoder(checkpoint, port=encoder_port) as encoder:
                while http.get("/health").headers["X-Encoder"] != "up":
                    time.sleep(0.2)
                replies = [threads.submit(chat, http, "see ", (image,), **fields) for image in images]
                time.sleep(random.choice((0.0, 0.01, 0.1, 0.3)))
                encoder.stop(random.choice((signal.SIGKILL, signal.SIGSTOP)))
                began = time.monotonic()
                for image, reply in zip(images, [reply.result() for reply in replies], strict=True):
                    told[reply.status_code] += 1
                    assert reply.status_code in (200, 503), reply.text
                    if reply.status_code == 200:
                        answer = reply.json()
                        found = answer["choices"][0]["message"]["content"] + answer["sglext"]["routed_experts"]
                        assert found == expected.setdefault(image, found)
                # Those of the engine's own, and the encoder's.
                assert time.monotonic() - began < 6 + 10
    assert told[200] > 0 and told[503] > 0, told
    state = http.get("/get_server_info").json()
    assert state["num_running"] == state["num_waiting"] == state["num_images_encoding"] == 0
