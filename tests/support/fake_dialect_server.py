"""A server of sglang's dialect in pure Python, which keeps every rule of routed experts: a transport of httpx, with a
prefix cache, streams, pauses, aborts and retractions. Rows are a function of position and token.

Legend: L layers, of which the first is dense, M with experts, K experts of a token.
"""

from __future__ import annotations

import base64
import json
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

NUM_LAYERS, TOP_K, NUM_EXPERTS = 4, 3, 16
LAYER_IDS = [1, 2, 3]
VERSION = "first"
FIELD = "routed_experts_start_len"
PATIENCE_S = 20.0


def row(position: int, token: int) -> np.ndarray:
    """Ids [M, K], distinct in a layer and never zero."""
    first = 7 * position + 3 * token
    return np.array(
        [[1 + (first + 5 * layer + slot) % (NUM_EXPERTS - 1) for slot in range(TOP_K)] for layer in LAYER_IDS]
    )


def rows_of(tokens: list[int], start: int, end: int) -> np.ndarray:
    """Ids [end - start, M, K]."""
    rows = [row(position, tokens[position]) for position in range(start, end)]
    return np.array(rows, np.uint8).reshape(-1, len(LAYER_IDS), TOP_K)


def next_token(tokens: list[int]) -> int:
    return 33 + (31 * sum(tokens) + len(tokens)) % 90


@dataclass
class Running:
    """A request under way."""

    body: dict[str, Any]
    rid: str
    prompt: list[int]
    num_cached: int
    output: list[int] = field(default_factory=list)
    finish: dict[str, Any] | None = None
    num_retractions: int = 0
    # Of a session that leaves its start to the server: where an answer begins, and the first choice of this prompt.
    auto_start: int | None = None
    first_start: int | None = None

    @property
    def start(self) -> int:
        return self.body.get(FIELD, 0) if self.auto_start is None else self.auto_start


class FakeDialectServer(httpx.BaseTransport):
    """`requests` are the bodies of `/generate`. What an extension offers is left out with `extensions=False`."""

    def __init__(self, *, extensions: bool = True) -> None:
        self.requests: list[dict[str, Any]] = []
        self._extensions = extensions
        self._changed = threading.Condition()
        self._paused = False
        self._running: dict[str, Running] = {}
        self._cached: list[list[int]] = []
        self._delivered: dict[str, list[list[int]]] = {}

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.read() or b"{}")
        match request.url.path:
            case "/generate":
                return self._generate(body)
            case "/get_weight_version":
                return httpx.Response(200, json={"weight_version": VERSION})
            case "/model_info" | "/server_info":
                return httpx.Response(200, json={"weight_version": VERSION, "dp_size": 1})
            case "/pause_generation" | "/continue_generation":
                self._pause(body.get("mode"))
                return httpx.Response(200, json={"status": "ok"})
            case "/abort_request":
                self._abort(body["rid"])
                return httpx.Response(200)
        return httpx.Response(404, json={})

    def _pause(self, mode: str | None) -> None:
        with self._changed:
            self._paused = mode is not None
            for running in self._running.values():
                running.num_retractions += mode == "retract" and bool(running.output)
            self._changed.notify_all()

    def _abort(self, rid: str) -> None:
        with self._changed:
            if rid in self._running:
                self._running[rid].finish = {"type": "abort", "message": "aborted"}
            self._changed.notify_all()

    def _generate(self, body: dict[str, Any]) -> httpx.Response:
        self.requests.append(body)
        prompt, start = body["input_ids"], body.get(FIELD, 0)
        is_auto = self._extensions and start == "auto" and "session_id" in body
        if start == "auto" and not is_auto:
            return self._refuse(body, f"{FIELD}: must be an integer")
        if is_auto:
            known = self._delivered.setdefault(body["session_id"], [])
            start = min(max((common_prefix(prompt, one) for one in known), default=0), len(prompt) - 1)
        if body.get("return_routed_experts") and not 0 <= start <= len(prompt):
            return self._refuse(body, f"{FIELD}={start} is out of range")
        num_choices = body["sampling_params"].get("n", 1)
        choices = [self._start(body, prompt) for _ in range(num_choices)]
        for index, running in enumerate(choices if is_auto else ()):
            running.auto_start, running.first_start = (len(prompt) - 1, start) if index else (start, None)
        if body.get("stream"):
            return httpx.Response(200, headers={"Content-Type": "text/event-stream"}, content=self._events(choices[0]))
        for running in choices:
            for _ in self._steps(running):
                pass
        answers = [self._render(running, 0) for running in choices]
        if is_auto:
            known += [(running.prompt + running.output)[:-1] for running in choices]
        return httpx.Response(200, json=answers if num_choices > 1 else answers[0])

    def _refuse(self, body: dict[str, Any], message: str) -> httpx.Response:
        if not body.get("stream"):
            return httpx.Response(400, json={"error": {"message": message}})
        reason = {"type": "abort", "message": message, "status_code": 400}
        event = {"text": "", "output_ids": [], "meta_info": {"finish_reason": reason}}
        return httpx.Response(200, content=[sse(event), b"data: [DONE]\n\n"])

    def _start(self, body: dict[str, Any], prompt: list[int]) -> Running:
        common = [common_prefix(prompt, one) for one in self._cached]
        rid = body.get("rid", f"r{len(self.requests)}")
        running = Running(body, rid, prompt, min(max(common, default=0), len(prompt) - 1))
        with self._changed:
            self._running[rid] = running
        return running

    def _steps(self, running: Running) -> Iterator[None]:
        """One token a step, until it has all of them or is aborted; in a pause it waits."""
        while running.finish is None:
            with self._changed:
                changed = self._changed.wait_for(lambda: not self._paused or running.finish is not None, PATIENCE_S)
                assert changed, "nobody ends the pause"
            if running.finish is None:
                running.output.append(next_token(running.prompt + running.output))
                if len(running.output) == running.body["sampling_params"]["max_new_tokens"]:
                    running.finish = {"type": "length", "length": len(running.output)}
                yield
        with self._changed:
            self._running.pop(running.rid, None)
            if running.output:
                self._cached.append((running.prompt + running.output)[:-1])

    def _events(self, running: Running) -> Iterator[bytes]:
        """Cumulative tokens; rows at the end, or with `stream_routed_experts` those that are new."""
        deltas = self._extensions and running.body.get("stream_routed_experts")
        num_sent, num_told = running.start, 0
        for _ in self._steps(running):
            answer = self._render(running, num_sent if deltas else running.start)
            if deltas:
                num_sent = max(len(running.prompt) + len(running.output) - 1, num_sent)
            elif running.finish is None:
                for name in ROUTE_KEYS:
                    answer["meta_info"].pop(name, None)
            num_told = len(running.output)
            yield sse(answer)
        assert running.finish is not None
        if running.finish["type"] == "abort" or num_told < len(running.output):
            yield sse(self._render(running, num_sent if deltas else running.start))
        yield b"data: [DONE]\n\n"

    def _render(self, running: Running, start: int) -> dict[str, Any]:
        tokens = running.prompt + running.output
        meta: dict[str, Any] = {
            "id": running.rid,
            "finish_reason": running.finish,
            "prompt_tokens": len(running.prompt),
            "completion_tokens": len(running.output),
            "cached_tokens": running.num_cached,
            "weight_version": VERSION,
            "num_retractions": running.num_retractions,
        }
        if running.body.get("return_routed_experts") and running.output:
            start = max(start, running.start)
            meta |= self._routes(running.body, rows_of(tokens, start, len(tokens) - 1), start)
            if running.first_start is not None:
                prefix = {"choice": 0, "start": running.first_start, "end": start}
                meta["routed_experts_prefix"] = prefix
        return {"text": "", "output_ids": list(running.output), "meta_info": meta}

    def _routes(self, body: dict[str, Any], rows: np.ndarray, start: int) -> dict[str, Any]:
        is_compact = self._extensions and body.get("routed_experts_format") == "compact"
        return pack(rows, start, is_compact) if self._extensions else {"routed_experts": encode(widened(rows))}


ROUTE_KEYS = ("routed_experts", "routed_experts_meta", "routed_experts_start_len")


def pack(rows: np.ndarray, start: int, is_compact: bool) -> dict[str, Any]:
    """The keys of an answer with these rows [R, M, K]."""
    data = rows.astype(np.uint8).tobytes()
    meta = {
        "start": start,
        "rows": len(rows),
        "num_layers": len(LAYER_IDS),
        "layer_ids": LAYER_IDS,
        "top_k": TOP_K,
        "dtype": "uint8",
        "byte_order": "little",
        "weight_versions": [[VERSION, start, start + len(rows)]] if len(rows) else [],
        "checksum": f"crc32:{zlib.crc32(data):08x}",
    }
    text = base64.b64encode(data).decode() if is_compact else encode(widened(rows))
    return dict(zip(ROUTE_KEYS, (text, meta, start), strict=True))


def widened(rows: np.ndarray) -> np.ndarray:
    """Rows [R, M, K] over all layers, the dense one zero."""
    wide = np.zeros((len(rows), NUM_LAYERS, TOP_K), "<i4")
    wide[:, LAYER_IDS] = rows
    return wide


def encode(rows: np.ndarray) -> str:
    return base64.b64encode(rows.tobytes()).decode()


def sse(event: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(event).encode() + b"\n\n"


def common_prefix(first: list[int], second: list[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
