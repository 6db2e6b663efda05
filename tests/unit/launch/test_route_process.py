"""The router as a process, before servers on sockets: how it ends, and what a caller at a socket sees."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from support.http_service import served

READY = "routing at "


class Engine:
    """One of either kind. A stream says one thing a tenth of a second, for `stream_s`."""

    def __init__(self, stream_s: float = 0.3) -> None:
        self.num_left = 0
        self._stream_s = stream_s
        self.app = app = FastAPI()

        @app.get("/health")
        async def health() -> Response:
            return Response()

        @app.post("/generate")
        async def generate(http: Request) -> Response:
            is_stream = (await http.json()).get("stream")
            return StreamingResponse(self._events()) if is_stream else JSONResponse({"text": "a"})

    async def _events(self) -> AsyncIterator[bytes]:
        try:
            until = time.monotonic() + self._stream_s
            while time.monotonic() < until:
                yield b"data: 1\n\n"
                await anyio.sleep(0.1)
        except BaseException:
            self.num_left += 1
            raise
        yield b"data: [DONE]\n\n"


@contextmanager
def routing(decode: Engine, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    with served(Engine().app) as prefill, served(decode.app) as follower:
        command = [sys.executable, "-m", "waybill.launch.command_line", "route", "--port", "0", *options]
        command += ["--prefill", prefill.url, "--decode", follower.url]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith(READY), line
        try:
            yield process, line.removeprefix(READY).strip()
        finally:
            process.kill()
            process.wait()


def stream(url: str, lines: list[str]) -> threading.Thread:
    def read() -> None:
        try:
            with httpx.stream("POST", f"{url}/generate", json={"stream": True}, timeout=30) as reply:
                lines.extend(line for line in reply.iter_lines() if line)
        except httpx.HTTPError as error:
            lines.append(type(error).__name__)

    thread = threading.Thread(target=read)
    thread.start()
    return thread


@pytest.mark.parametrize(("timeout_s", "end"), [("20", "data: [DONE]"), ("0.5", "RemoteProtocolError")])
def test_what_runs_at_sigterm_has_its_time_and_is_ended_then(timeout_s: str, end: str) -> None:
    engine, lines, began = Engine(1.0 if timeout_s == "20" else 30.0), list[str](), time.monotonic()
    with routing(engine, "--shutdown-timeout", timeout_s) as (process, url):
        thread = stream(url, lines)
        time.sleep(0.5)
        process.terminate()
        time.sleep(0.2)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
        thread.join()
        assert process.wait(10) == 0 and time.monotonic() - began < 15
        assert lines[-1] == end
        while not engine.num_left and end != "data: [DONE]":
            time.sleep(0.01)


def test_a_second_signal_insists() -> None:
    lines: list[str] = []
    with routing(Engine(30.0)) as (process, url):
        thread = stream(url, lines)
        time.sleep(0.5)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        assert process.wait(5) == 0
        thread.join()


def test_heads_bodies_and_connections_at_a_socket() -> None:
    with routing(Engine(), "--max-body-bytes", "1000") as (_, url), httpx.Client(base_url=url) as client:
        for _ in range(3):
            reply = client.post("/generate", json={})
            assert reply.json() == {"text": "a"} and reply.headers.get_list("date")[1:] == []
            assert reply.headers["content-length"] == str(len(reply.content))
        head: Any = client.head("/health")
        assert head.status_code == 200
        announced = client.post("/generate", content=b"x" * 1001)
        pieces = client.post("/generate", content=iter([b"x" * 600, b"x" * 600]))
        assert announced.status_code == pieces.status_code == 413
        assert "--max-body-bytes" in pieces.json()["error"]["message"]
        assert client.get("/health", headers={"X-Long": "x" * (17 << 10)}).status_code == 400
