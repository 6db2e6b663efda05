"""Servers that break one rule of routed experts: each is a proxy's change of requests and answers, and knows by itself
nothing of the server behind it.

Legend: R rows (tokens as inputs), N layers of the form at hand, K experts of a token.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

FIELD = "routed_experts_start_len"
ROUTE_KEYS = ("routed_experts", "routed_experts_meta", FIELD, "routed_experts_dtype")
Body = dict[str, Any]


class Rows:
    """The rows of an answer, to be changed: `array` [R, N, K] in either form, of the positions from `start` on."""

    def __init__(self, body: Body, answer: Body) -> None:
        self._meta = answer["meta_info"]
        self._envelope = self._meta["routed_experts_meta"]
        self._is_compact = body.get("routed_experts_format") == "compact"
        self.start = self._envelope["start"]
        self.end = self.start + self._envelope["rows"]
        flat = np.frombuffer(base64.b64decode(self._meta["routed_experts"]), np.uint8 if self._is_compact else "<i4")
        top_k = self._envelope["top_k"]
        num_layers = flat.size // (self._envelope["rows"] * top_k) if flat.size else self._envelope["num_layers"]
        self.array = flat.reshape(-1, num_layers, top_k).copy()

    def put(self, start: int | None = None) -> None:
        """The array in the answer's form, its envelope with it."""
        start = self.start if start is None else start
        data, end = self.array.tobytes(), start + len(self.array)
        version = self._meta["weight_version"]
        runs = [[version, start, end]] if len(self.array) else []
        self._envelope.update(start=start, rows=len(self.array), weight_versions=runs)
        if self._is_compact:
            self._envelope["checksum"] = f"crc32:{zlib.crc32(data):08x}"
        self._meta.update({"routed_experts": base64.b64encode(data).decode(), FIELD: start})


Change = Callable[[Body, Body], None]
Forward = Callable[[Body], httpx.Response]


@dataclass
class Mutant:
    """`rule` is what it breaks, `implied` are those that are broken with it.

    `answer` changes every answer and every event of a stream; `whole` answers that are not streamed, as a list; `replace`
    may answer a request in the server's place; `reply` changes what other paths answer.
    """

    name: str
    rule: str
    implied: tuple[str, ...] = ()
    answer: Change | None = None
    whole: Callable[[Body, list[Body]], None] | None = None
    replace: Callable[[Body, Forward], httpx.Response | None] | None = None
    reply: Callable[[str, Any], None] | None = None


class MutantTransport(httpx.BaseTransport):
    """In front of the transport of a server."""

    def __init__(self, inner: httpx.BaseTransport, mutant: Mutant) -> None:
        self._inner, self._mutant = inner, mutant

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path != "/generate":
            response = self._inner.handle_request(request)
            if self._mutant.reply is None or request.url.path == "/continue_generation":
                return response
            response.read()
            content = json.loads(response.content or b"{}")
            self._mutant.reply(request.url.path, content)
            return httpx.Response(response.status_code, json=content)
        body = json.loads(request.read())

        def forward(changed: Body) -> httpx.Response:
            headers = {name: value for name, value in request.headers.items() if name != "content-length"}
            return self._inner.handle_request(httpx.Request("POST", request.url, headers=headers, json=changed))

        response = None if self._mutant.replace is None else self._mutant.replace(body, forward)
        return self._changed(body, forward(body) if response is None else response)

    def _changed(self, body: Body, response: httpx.Response) -> httpx.Response:
        if not response.is_success:
            return response
        if body.get("stream"):
            return httpx.Response(
                200, headers={"Content-Type": "text/event-stream"}, content=self._events(body, response)
            )
        response.read()
        content = json.loads(response.content)
        answers = content if isinstance(content, list) else [content]
        for answer in answers:
            self._change(body, answer)
        if self._mutant.whole is not None:
            self._mutant.whole(body, answers)
        return httpx.Response(200, json=content)

    def _events(self, body: Body, response: httpx.Response) -> Iterator[bytes]:
        pending = b""
        try:
            for piece in response.iter_bytes():
                *lines, pending = (pending + piece).split(b"\n\n")
                for line in lines:
                    yield self._event(body, line) + b"\n\n"
        finally:
            response.close()

    def _event(self, body: Body, line: bytes) -> bytes:
        data = line.removeprefix(b"data: ")
        if data == b"[DONE]":
            return line
        event = json.loads(data)
        self._change(body, event)
        return b"data: " + json.dumps(event).encode()

    def _change(self, body: Body, answer: Body) -> None:
        if self._mutant.answer is not None:
            self._mutant.answer(body, answer)


def has_rows(answer: Body) -> bool:
    return isinstance(answer["meta_info"].get("routed_experts"), str)


def refusal(message: str, status: int = 400) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": message}})
