"""Bodies that no client should send: each is answered or refused in good form, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.hostile_bodies import JSON, PARAMS, VALID, Body, Fuzzer, fault_of
from support.server_process import ServerProcess

SEED = 20260
NUM_BODIES = 2_000
NUM_BODIES_IN_MATRIX = 10_500
CONCURRENCY = 16
ANSWER_TIMEOUT_S = 20.0
IDLE_TIMEOUT_S = 20.0
MAX_SHOWN = 20
# They pause, empty and replace what the neighbour asks. tests/unit/engine/entrypoints/test_control.py sends
# hostile values to each of them, over an engine that does nothing.
LEFT_OUT = {
    "/flush_cache",
    "/pause_generation",
    "/continue_generation",
    "/release_memory_occupation",
    "/resume_memory_occupation",
    "/update_weights_from_disk",
    "/update_weights_from_tensor",
    "/update_weights_from_distributed",
    "/init_weights_update_group",
    "/destroy_weights_update_group",
    "/get_weights_by_name",
    "/update_weight_version",
    "/weights_checker",
}

NEIGHBOUR_REQUEST: dict[str, Any] = {
    "text": "The waybill names every stop",
    "sampling_params": {"temperature": 0.0, "max_new_tokens": 12, "ignore_eos": True},
    "return_routed_experts": True,
}


class Neighbour:
    """Asks the same all the time and wants the same answer."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self.answers: Counter[str] = Counter()
        self._num_asked = 0

    async def run(self) -> None:
        while True:
            await self.ask()

    async def ask(self) -> None:
        # No rid of the test is a prefix of this one, so no abort means it.
        # The last question may be cancelled on its way, and its rid is taken until the engine has let go.
        rid = f"~neighbour-{self._num_asked}"
        self._num_asked += 1
        reply = await self._client.post("/generate", json={**NEIGHBOUR_REQUEST, "rid": rid}, timeout=ANSWER_TIMEOUT_S)
        assert reply.status_code == 200, reply.text
        answer = reply.json()
        meta = answer["meta_info"]
        told = (answer["text"], answer["output_ids"], meta["finish_reason"], meta["routed_experts"])
        self.answers[json.dumps(told)] += 1


class Run:
    """Sends all bodies and keeps what was wrong."""

    def __init__(self, client: httpx.AsyncClient, bodies: Iterator[Body]) -> None:
        self._client = client
        self._bodies = bodies
        self.statuses: Counter[int] = Counter()
        self.faults: list[str] = []
        self.slowest_s = 0.0

    async def work(self) -> None:
        """One connection's share."""
        for body in self._bodies:
            began = time.monotonic()
            try:
                reply = await self._client.post(
                    body.path, content=body.content, headers={"content-type": body.content_type}
                )
                fault = fault_of(reply)
                self.statuses[reply.status_code] += 1
            except (httpx.HTTPError, ValueError) as error:
                fault = repr(error)
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
            if fault is not None:
                self.faults.append(f"{fault}\n    {body}")
                if len(self.faults) >= MAX_SHOWN:
                    return


async def fuzz(url: str, num_bodies: int) -> tuple[Run, Neighbour]:
    limits = httpx.Limits(max_connections=CONCURRENCY, max_keepalive_connections=CONCURRENCY)
    async with (
        httpx.AsyncClient(base_url=url, timeout=ANSWER_TIMEOUT_S, limits=limits) as client,
        httpx.AsyncClient(base_url=url) as quiet,
    ):
        openapi = (await client.get("/openapi.json")).json()
        bodies = iter(Fuzzer(openapi, SEED))
        run = Run(client, (body for body, _ in zip(bodies, range(num_bodies), strict=False)))
        neighbour = Neighbour(quiet)
        await neighbour.ask()
        asking = asyncio.create_task(neighbour.run())
        await asyncio.gather(*(run.work() for _ in range(CONCURRENCY)))
        if asking.done():
            asking.result()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await neighbour.ask()
        return run, neighbour


def server_info(http: httpx.Client) -> dict[str, Any]:
    """Once nothing runs any more."""
    deadline = time.monotonic() + IDLE_TIMEOUT_S
    while True:
        info: dict[str, Any] = http.get("/get_server_info").json()
        if (info["num_running"], info["num_waiting"]) == (0, 0) or time.monotonic() > deadline:
            return info
        time.sleep(0.1)


@pytest.fixture(scope="module")
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=ANSWER_TIMEOUT_S) as client:
        yield client


def assert_idle_and_whole(http: httpx.Client) -> None:
    """No request is left and no page is lost."""
    info = server_info(http)
    assert (info["num_running"], info["num_waiting"]) == (0, 0)
    assert info["num_free_pages"] + info["num_cached_pages"] == info["num_pages"]
    assert http.post("/flush_cache").status_code == 200
    assert server_info(http)["num_free_pages"] == info["num_pages"]


def test_every_route_is_fuzzed_or_left_out_by_name(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    assert {path for path, methods in paths.items() if "post" in methods} == {*VALID, *LEFT_OUT}


@pytest.mark.parametrize(
    "num_bodies", [NUM_BODIES, pytest.param(NUM_BODIES_IN_MATRIX, marks=pytest.mark.matrix)], ids=["some", "many"]
)
def test_thousands_of_hostile_bodies(server: ServerProcess, http: httpx.Client, num_bodies: int) -> None:
    began = time.monotonic()
    run, neighbour = asyncio.run(fuzz(server.url, num_bodies))
    statuses = dict(sorted(run.statuses.items()))
    print(
        f"\n{run.statuses.total()} bodies in {time.monotonic() - began:.1f} s: {statuses}; slowest {run.slowest_s:.2f} s; "
        f"{neighbour.answers.total()} answers to the neighbour"
    )
    assert not run.faults, "\n".join(run.faults)
    assert run.statuses.total() == num_bodies
    assert run.statuses[200] > num_bodies // 20 and run.statuses[400] > num_bodies // 2, statuses
    assert len(neighbour.answers) == 1, neighbour.answers
    # A few hundred bodies pass while it asks once, on a busy machine.
    assert neighbour.answers.total() > num_bodies // 300
    assert_idle_and_whole(http)


def text_with(**params: Any) -> dict[str, Any]:
    return {"text": "a", "sampling_params": {"max_new_tokens": 2, **params}}


CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
EVERY_TOKEN = list(range(264))


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        # Two samples of one name ended rank 0.
        (
            "/generate",
            {"text": ["a", "b"], "rid": ["x", "x_0"], "sampling_params": [{"n": 2, **PARAMS}, PARAMS]},
            "rid: 'x_0' names two samples",
        ),
        # Never ran and never ended.
        ("/generate", {"text": "a", "sampling_params": {"min_new_tokens": 99_999}}, "min_new_tokens=99999"),
        # Did not fit the message to the leader: 500.
        ("/generate", {"text": "a", "sampling_params": {"min_new_tokens": 2**70}}, "min_new_tokens"),
        ("/generate", text_with(top_k=2**70), "top_k"),
        # Does not fit a tensor of the sampler.
        ("/generate", text_with(top_k=2**63), "top_k"),
        # Scores that are no numbers any more sampled a token outside the vocabulary, which ended the ranks.
        ("/generate", text_with(logit_bias={"5": 1e308}, frequency_penalty=1.0), "logit_bias"),
        ("/generate", text_with(repetition_penalty=1e-308), "repetition_penalty"),
        ("/generate", text_with(stop_token_ids=EVERY_TOKEN, min_new_tokens=2), "stop_token_ids"),
        # Answers repeat the name: 400 about a codec, and a stream that broke off.
        ("/v1/completions", {"prompt": "a", "max_tokens": 2, "model": "\ud800", "stream": True}, "model"),
        ("/v1/chat/completions", {**CHAT, "model": "\ud800", "stream": True}, "model"),
        # Collided with arguments of the template's own: 500.
        ("/v1/chat/completions", {**CHAT, "chat_template_kwargs": {"self": 1}}, "chat_template_kwargs"),
        ("/v1/chat/completions", {**CHAT, "chat_template_kwargs": {"eos_token": 1}}, "chat_template_kwargs"),
    ],
)
def test_what_once_broke_it_is_refused(http: httpx.Client, path: str, body: dict[str, Any], words: str) -> None:
    reply = http.post(path, content=json.dumps(body), headers={"content-type": JSON})
    assert fault_of(reply) is None and reply.status_code == 400, reply.text
    assert words in reply.json()["error"]["message"]
    assert_idle_and_whole(http)


@pytest.mark.parametrize("stream", [False, True])
def test_a_start_that_nobody_reads_may_be_anything(http: httpx.Client, stream: bool) -> None:
    """Checked only when routes were asked for; the number did not fit the message to the leader: 500."""
    body = {**text_with(), "stream": stream, "routed_experts_start_len": 2**70}
    reply = http.post("/generate", json=body)
    assert reply.status_code == 200 and fault_of(reply) is None, reply.text
