"""Limits, keys, and the end of a server: small servers of their own."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from support.server_process import ROOT, ServerProcess

# A quarter of the machine's memory, which is what a server takes if nothing is said, takes seconds to fill.
SMALL = ("--tp", "1", "--kv-cache-tokens", "8192")
LONG = {"temperature": 0.0, "max_new_tokens": 2000, "ignore_eos": True}
SECRET = "key-of-the-limits-test"
KEY = {"Authorization": f"Bearer {SECRET}"}


@pytest.fixture(scope="module")
def guarded() -> Iterator[ServerProcess]:
    """One rank, no routing, a key, and room for little."""
    server = ServerProcess(
        *(*SMALL, "--max-running-requests", "2", "--max-waiting-requests", "1", "--max-body-bytes", "4096"),
        *("--host", "127.0.0.2", "--claim-ttl", "0.1"),
        *("--api-key", SECRET, "--header-timeout", "1.5", "--max-connections", "20", "--allow-host", "waybill.example"),
    )
    yield server
    server.stop()


def test_a_key_is_asked_for(guarded: ServerProcess) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        reply = httpx.post(f"{guarded.url}/generate", json={"input_ids": [5]}, headers=headers)
        assert reply.status_code == 401 and reply.json()["error"]["type"] == "AuthenticationError"
    assert httpx.get(f"{guarded.url}/health").status_code == 200
    assert httpx.get(f"{guarded.url}/model_info", headers=KEY).status_code == 200


def test_a_key_is_seen_by_nobody_else(guarded: ServerProcess) -> None:
    """It was given on the command line."""
    processes = [psutil.Process(guarded.process.pid), *guarded.descendants()]
    assert len(processes) >= 4
    for process in processes:
        assert SECRET not in " ".join(process.cmdline())
    folders = {
        part
        for process in processes
        for argument in process.cmdline()
        for part in (Path(argument), Path(argument).parent)
        if Path(argument).is_absolute() and part.name.startswith("waybill-")
    }
    assert folders
    for folder in folders:
        assert folder.stat().st_mode & 0o077 == 0
        assert not [file for file in folder.rglob("*") if file.is_file() and SECRET.encode() in file.read_bytes()]
    assert SECRET not in httpx.get(f"{guarded.url}/get_server_info", headers=KEY).text
    assert not any(SECRET in line for line in guarded.lines)


def test_bounds_of_the_command_line_hold(guarded: ServerProcess) -> None:
    host, port = guarded.url.removeprefix("http://").split(":")
    clients = [socket.create_connection((host, int(port)), timeout=30) for _ in range(20)]
    reply = httpx.get(f"{guarded.url}/v1/models", headers=KEY)
    assert reply.status_code == 503 and "--max-connections" in reply.json()["error"]["message"]
    for client in clients:
        assert client.recv(1) == b""
        client.close()
    assert httpx.get(f"{guarded.url}/v1/models", headers=KEY).status_code == 200


def test_pages_and_names_of_others_are_refused(guarded: ServerProcess) -> None:
    for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}):
        assert httpx.post(f"{guarded.url}/flush_cache", headers=headers).status_code == 403
        assert httpx.get(f"{guarded.url}/metrics", headers=headers).status_code == 403
        assert httpx.post(f"{guarded.url}/flush_cache", headers=KEY | headers).status_code == 200
    assert httpx.get(f"{guarded.url}/health", headers={"Host": "waybill.example"}).status_code == 200


def test_large_bodies_are_refused_with_and_without_a_stated_length(guarded: ServerProcess) -> None:
    body = b'{"text": "' + b"x" * 5000 + b'"}'
    headers = KEY | {"Content-Type": "application/json"}
    contents: tuple[Any, ...] = (body, iter([body[:3000], body[3000:]]))
    for content in contents:
        reply = httpx.post(f"{guarded.url}/generate", content=content, headers=headers)
        assert reply.status_code == 413 and "4096" in reply.json()["error"]["message"]


def test_opting_in_without_routing_is_refused_with_a_hint(guarded: ServerProcess) -> None:
    body = {"input_ids": [5], "return_routed_experts": True}
    reply = httpx.post(f"{guarded.url}/generate", json=body, headers=KEY)
    assert reply.status_code == 400 and "--enable-return-routed-experts" in reply.json()["error"]["message"]


def test_too_many_requests_are_told_to_come_back(guarded: ServerProcess) -> None:
    with httpx.Client(base_url=guarded.url, headers=KEY, timeout=60.0) as http:
        body = {"input_ids": [[5], [6], [7]], "sampling_params": LONG, "rid": "many"}
        thread = threading.Thread(target=lambda: http.post("/generate", json=body))
        thread.start()
        while http.get("/v1/loads").json()["loads"][0]["num_running_reqs"] < 2:
            time.sleep(0.01)
        reply = http.post("/generate", json={"input_ids": [5]})
        assert reply.status_code == 503 and int(reply.headers["Retry-After"]) >= 1
        assert "at most 3" in reply.json()["error"]["message"]
        assert 'outcome="overloaded"' in http.get("/metrics").text
        # Full and busy is well: a step is proof enough, and nothing joins the queue for it.
        assert http.get("/health_generate").status_code == 200
        load = http.get("/v1/loads").json()["loads"][0]
        assert (load["num_running_reqs"], load["num_waiting_reqs"]) == (2, 1)
        http.post("/abort_request", json={"abort_all": True})
        thread.join(30)
        assert http.post("/generate", json={"input_ids": [5]}).status_code == 200


def test_a_claim_expires() -> None:
    server = ServerProcess(*SMALL, "--enable-return-routed-experts", "--claim-ttl", "0.2")
    try:
        body = {"input_ids": [5, 6], "return_routed_experts": True, "routed_experts_delivery": "reference"}
        claim = httpx.post(f"{server.url}/generate", json=body).json()["meta_info"]["routed_experts_claim"]
        time.sleep(0.5)
        reply = httpx.get(f"{server.url}/routed_experts/{claim}")
        assert reply.status_code == 410 and "expired" in reply.json()["error"]["message"]
        # The end: what runs is finished, nothing new is taken, no child is left.
        finished = []

        def run() -> None:
            params = {"temperature": 0.0, "max_new_tokens": 100, "ignore_eos": True}
            reply = httpx.post(f"{server.url}/generate", json={"input_ids": [5], "sampling_params": params}, timeout=60)
            finished.append(reply.json()["meta_info"]["completion_tokens"])

        thread = threading.Thread(target=run)
        thread.start()
        while httpx.get(f"{server.url}/v1/loads").json()["loads"][0]["num_running_reqs"] < 1:
            time.sleep(0.01)
    finally:
        server.stop()
    thread.join(10)
    assert finished == [100]
    assert not any("Traceback" in line for line in server.lines), "\n".join(server.lines)


def test_what_outlasts_the_bound_is_aborted_and_answers() -> None:
    server = ServerProcess(*SMALL, "--shutdown-timeout", "1")
    answers: list[Any] = []

    def run() -> None:
        body = {"input_ids": [5], "sampling_params": {**LONG, "max_new_tokens": 4000}}
        answers.append(httpx.post(f"{server.url}/generate", json=body, timeout=60).json())

    thread = threading.Thread(target=run)
    thread.start()
    while httpx.get(f"{server.url}/v1/loads").json()["loads"][0]["num_running_reqs"] < 1:
        time.sleep(0.01)
    began = time.monotonic()
    server.stop()
    assert time.monotonic() - began < 20
    thread.join(10)
    meta = answers[0]["meta_info"]
    assert meta["finish_reason"]["type"] == "abort" and 0 < meta["completion_tokens"] < 4000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "70000"], "--port 70000"),
        (["--max-body-bytes", "0"], "--max-body-bytes 0"),
        (["--api-key-file", "/nowhere"], "--api-key-file /nowhere: No such file"),
        (["--api-key", ""], "--api-key"),
        (["--shutdown-timeout", "99"], "--shutdown-timeout 99.0: must lie in 0 .. 25.0"),
    ],
)
def test_mistakes_on_the_command_line_are_said_at_once(arguments: list[str], words: str) -> None:
    ended = subprocess.run([str(ROOT / "torchrun.sh"), "serve", *arguments], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and words in ended.stderr


@pytest.mark.parametrize("after_s", [1.5, 2.0, 2.5])
def test_a_server_that_is_told_to_stop_while_it_starts_does(after_s: float) -> None:
    """While ranks import, when they have met and the frontend imports, and later, in whatever order machines have these."""
    command = [str(ROOT / "torchrun.sh"), "serve", *SMALL, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    time.sleep(after_s)
    process.terminate()
    assert process.wait(20) != 0
