"""One router before two engines for prompts and two for what follows: answers are those of one engine, whoever has died."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from support.engine_pair import free_port
from support.server_process import ServerProcess

from waybill.launch.node_options import RUN_SECRET_VARIABLE

OPTIONS = ("--tp", "1", "--num-threads", "1", "--enable-return-routed-experts", "--kv-cache-tokens", "4096")
PARAMS = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
PROMPTS = [f"prompt {i} of several, " * 4 for i in range(8)]
READY = "routing at "
REST_S = 20.0


class Service:
    def __init__(self) -> None:
        environment = os.environ | {RUN_SECRET_VARIABLE: "a secret of all sides"}
        ports = [free_port(), free_port()]
        sides = [("prefill", "--disaggregation-bootstrap-port", str(port)) for port in ports] + [("decode",)] * 2
        self.servers = [
            ServerProcess(*OPTIONS, "--disaggregation", *side, environment=environment, wait=False) for side in sides
        ]
        for server in self.servers:
            server.wait_until_ready()
        self.prefills, self.decodes = self.servers[:2], self.servers[2:]
        command = [sys.executable, "-m", "waybill.launch.command_line", "route", "--port", "0"]
        for prefill, port in zip(self.prefills, ports, strict=True):
            command += ["--prefill", prefill.url, str(port)]
        for decode in self.decodes:
            command += ["--decode", decode.url]
        self._router = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self._router.stderr is not None
        self.url = self._router.stderr.readline().removeprefix(READY).strip()

    def ask(self, prompt: str, **fields: Any) -> httpx.Response:
        body = {"text": prompt, "sampling_params": PARAMS, "return_routed_experts": True, **fields}
        return httpx.post(f"{self.url}/generate", json=body, timeout=60)

    def stop(self) -> None:
        self._router.terminate()
        assert self._router.wait(30) == 0
        for server in self.servers:
            if server.process.poll() is None:
                server.stop()


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    service = Service()
    yield service
    service.stop()


@pytest.fixture(scope="module")
def expected(service: Service) -> list[Any]:
    """A prefill's side alone is an engine, too."""
    url, body = service.prefills[0].url, {"sampling_params": PARAMS, "return_routed_experts": True}
    replies = [httpx.post(f"{url}/generate", json=body | {"text": prompt}, timeout=60).json() for prompt in PROMPTS]
    return [(reply["output_ids"], reply["meta_info"]["routed_experts"]) for reply in replies]


def at_rest(server: ServerProcess) -> dict[str, Any]:
    until = time.monotonic() + REST_S
    while time.monotonic() < until:
        state: dict[str, Any] = httpx.get(f"{server.url}/server_info", timeout=60).json()
        if state["num_running"] == state["num_waiting"] == state["num_transferring"] == 0:
            assert state["num_free_pages"] + state["num_cached_pages"] == state["num_pages"]
            return state
        time.sleep(0.05)
    raise AssertionError("the engine does not come to rest")


def check(replies: list[httpx.Response], expected: list[Any]) -> None:
    for reply, (output_ids, rows) in zip(replies, expected, strict=True):
        assert reply.status_code == httpx.codes.OK, reply.text
        assert reply.json()["output_ids"] == output_ids and reply.json()["meta_info"]["routed_experts"] == rows


@pytest.mark.matrix
def test_all_have_a_part_and_answers_are_those_of_one(service: Service, expected: list[Any]) -> None:
    with ThreadPoolExecutor(8) as threads:
        check(list(threads.map(service.ask, PROMPTS)), expected)
    assert all(at_rest(server)["num_transfers"] > 0 for server in service.servers)
    before = [at_rest(server)["num_transfers"] for server in service.servers]
    check([service.ask(prompt, session_id="s") for prompt in PROMPTS], expected)
    counts = [at_rest(server)["num_transfers"] - old for server, old in zip(service.servers, before, strict=True)]
    assert sorted(counts) == [0, 0, 8, 8], "a session stays where it is"


@pytest.mark.matrix
def test_a_caller_who_leaves_is_one_on_no_side(service: Service) -> None:
    for fields, timeout in (({"stream": True}, 30.0), ({}, 0.5)):
        body = {"text": "to be left " * 8, "sampling_params": PARAMS | {"max_new_tokens": 2000}, **fields}
        try:
            with httpx.stream("POST", f"{service.url}/generate", json=body, timeout=timeout) as left:
                next(left.iter_lines())
        except httpx.ReadTimeout:
            pass
        for server in service.servers:
            at_rest(server)


@pytest.mark.matrix
def test_who_has_died_is_left_out(service: Service, expected: list[Any]) -> None:
    """Last: the other tests need them."""
    for dying in (service.decodes[0], service.prefills[0]):
        dying.process.kill()
        dying.process.wait()
        until = time.monotonic() + REST_S
        while service.ask(PROMPTS[0]).status_code != httpx.codes.OK:
            assert time.monotonic() < until, "requests go to one that is not there"
        with ThreadPoolExecutor(8) as threads:
            check(list(threads.map(service.ask, PROMPTS)), expected)
        assert httpx.get(f"{service.url}/health", timeout=30).status_code == httpx.codes.OK
        assert f'{{side="{"decode" if dying in service.decodes else "prefill"}",url="{dying.url}"}} 0.0' in (
            httpx.get(f"{service.url}/metrics").text
        )
    for server in (service.prefills[1], service.decodes[1]):
        at_rest(server)
