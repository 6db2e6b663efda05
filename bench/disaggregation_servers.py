"""Two servers, one for prompts and one for what follows, each with a device of its own; asked as a router asks them."""

from __future__ import annotations

import itertools
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
from marked_results import kill_all

from waybill.launch.node_options import RUN_SECRET_VARIABLE

HOST = "127.0.0.1"
READY = "waybill is ready: "
INFO = '"level":"info"'
VISIBLE = "CUDA_VISIBLE_DEVICES"
LEAVE_S = 30.0
ANSWER_S = 120.0


def free_port() -> int:
    with socket.create_server((HOST, 0)) as listener:
        return int(listener.getsockname()[1])


@dataclass(frozen=True)
class Answer:
    """What a stream has brought: seconds until its first token, and all of its tokens."""

    first_s: float
    output_ids: list[int]


class Server:
    """A process of its own and what it starts; `environment` beside this process's, `python` of the package to run."""

    def __init__(self, options: list[str], environment: dict[str, str], python: str = sys.executable) -> None:
        self.process = subprocess.Popen(
            [python, "-m", "waybill.launch.command_line", "serve", "--port", "0", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            env=os.environ | environment,
        )
        self.client = httpx.Client(timeout=ANSWER_S)

    def wait(self) -> None:
        """
        Raises:
            RuntimeError: it has not started; what it said is printed.
        """
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(READY):
                self.client.base_url = httpx.URL(line.removeprefix(READY).strip())
                threading.Thread(target=self._drain, daemon=True).start()
                return
            print(line, end="", flush=True)
        raise RuntimeError("the server did not start")

    def _drain(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if INFO not in line:
                print(line, end="", flush=True)

    def state(self) -> dict[str, Any]:
        reply = self.client.get("/server_info")
        reply.raise_for_status()
        return dict(reply.json())

    def stream(self, body: dict[str, Any]) -> Answer:
        began, first_s, output_ids = time.perf_counter(), 0.0, []
        with self.client.stream("POST", "/generate", json={**body, "stream": True}) as reply:
            if reply.is_error:
                raise RuntimeError(reply.read().decode())
            for line in reply.iter_lines():
                if not line.startswith("data: {"):
                    continue
                first_s = first_s or time.perf_counter() - began
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise RuntimeError(line)
                output_ids = chunk["output_ids"]
        return Answer(first_s, output_ids)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(LEAVE_S)
            except subprocess.TimeoutExpired:
                kill_all(self.process.pid)
        self.process.wait()


class ServerPair:
    """`options` are those of both. On CUDA the prefill has the first visible device and the decode the second."""

    def __init__(self, options: list[str], decode: list[str], device: str, python: str = sys.executable) -> None:
        self.port = free_port()
        self._rooms = itertools.count(1)
        self._threads = ThreadPoolExecutor(64)
        visible = os.environ.get(VISIBLE, "0,1").split(",")
        secret = {RUN_SECRET_VARIABLE: secrets.token_hex(32)}
        prefill = ["--disaggregation", "prefill", "--disaggregation-bootstrap-port", str(self.port)]
        # Each sees both, its own first: a driver may map memory of a device that the process sees alone.
        places = [{VISIBLE: ",".join(each)} if device == "cuda" else {} for each in (visible[:2], visible[1::-1])]
        self.prefill = Server([*options, *prefill], secret | places[0], python)
        self.decode = Server([*options, "--disaggregation", "decode", *decode], secret | places[-1], python)
        try:
            for server in (self.prefill, self.decode):
                server.wait()
        except BaseException:
            self.close()
            raise

    def stream(self, body: dict[str, Any]) -> Answer:
        """The decode's side's."""
        body = {**body, "bootstrap_host": HOST, "bootstrap_port": self.port, "bootstrap_room": next(self._rooms)}
        prompt = self._threads.submit(self.prefill.stream, body)
        answer = self.decode.stream(body)
        prompt.result()
        return answer

    def close(self) -> None:
        for server in (self.prefill, self.decode):
            server.close()
        self._threads.shutdown()
