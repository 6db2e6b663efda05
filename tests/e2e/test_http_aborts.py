"""Requests of the native API that end early: aborted, left by their client, or refused for the rid of another that runs."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import httpx
import pytest
from support.engine_answers import GREEDY, ids
from support.native_api import generate, int32_rows, state, stream, wait_until_idle
from support.server_process import ServerProcess


def test_a_client_that_leaves_frees_its_pages(http: httpx.Client, server: ServerProcess) -> None:
    long = {"temperature": 0.0, "max_new_tokens": 3000, "ignore_eos": True}
    with (
        httpx.Client(base_url=server.url, timeout=60.0) as leaving,
        leaving.stream("POST", "/generate", json={"input_ids": ids("l"), "sampling_params": long, "stream": True}) as s,
    ):
        lines = s.iter_lines()
        next(lines)
        assert state(http)["num_running"] == 1
    wait_until_idle(http)
    with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=server.url, timeout=0.5) as impatient:
        impatient.post("/generate", json={"input_ids": ids("not streamed"), "sampling_params": long})
    wait_until_idle(http)


def test_a_rid_is_free_again_when_its_request_has_left_the_engine(http: httpx.Client, server: ServerProcess) -> None:
    """A client that leaves and comes back with the same rid is refused until the engine has let go, and then served."""
    body = {"input_ids": ids("again"), "rid": "re", "stream": True}
    for _ in range(10):
        with (
            httpx.Client(base_url=server.url, timeout=60.0) as leaving,
            leaving.stream(
                "POST", "/generate", json={**body, "sampling_params": {**GREEDY, "max_new_tokens": 300}}
            ) as s,
        ):
            lines = s.iter_lines()
            assert '"type":"abort"' not in next(lines)
        deadline = time.monotonic() + 20
        while "is in use" in (events := stream(http, **body, sampling_params=GREEDY))[-1]["meta_info"][
            "finish_reason"
        ].get("message", ""):
            assert time.monotonic() < deadline
        assert events[-1]["meta_info"]["finish_reason"]["type"] == "length"


@pytest.mark.parametrize("streaming", [True, False])
def test_of_requests_with_one_rid_one_runs(server: ServerProcess, streaming: bool) -> None:
    async def ask(client: httpx.AsyncClient) -> str:
        body = {"input_ids": ids("one of many"), "rid": "same", "stream": streaming, "sampling_params": GREEDY}
        return (await client.post("/generate", json=body)).text

    async def race() -> list[str]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60.0) as client:
            return await asyncio.gather(*(ask(client) for _ in range(8)))

    for _ in range(5):
        texts = asyncio.run(race())
        served = [text for text in texts if '"length"' in text]
        assert served and all("is in use" in text for text in texts if text not in served)


def test_an_abort_answers_with_what_there_is(http: httpx.Client) -> None:
    answers: list[Any] = []

    def ask() -> None:
        long = {"temperature": 0.0, "max_new_tokens": 3000, "ignore_eos": True}
        answers.append(generate(http, input_ids=ids("to be aborted"), rid="abort-me-1", sampling_params=long))

    thread = threading.Thread(target=ask)
    thread.start()
    while state(http)["num_running"] == 0:
        time.sleep(0.01)
    time.sleep(0.2)
    assert http.post("/abort_request", json={"rid": "abort-me", "abort_message": "too late"}).content == b""
    assert http.get("/v1/loads").json()["loads"][0]["num_total_reqs"] == 0, "an abort is answered when it has happened"
    thread.join(30)
    meta = answers[0]["meta_info"]
    assert meta["finish_reason"]["type"] == "abort" and meta["finish_reason"]["message"] == "too late"
    assert 0 < meta["completion_tokens"] < 3000
    assert len(int32_rows(answers[0])) == meta["prompt_tokens"] + meta["completion_tokens"] - 1
