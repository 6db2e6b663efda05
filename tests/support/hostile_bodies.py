"""Bodies that no client should send, and what a good answer to any of them looks like.

`Fuzzer` takes valid bodies and fields of the server's own `/openapi.json`, puts hostile values in their places and damages
the bytes. It is seeded, so that a failure comes again.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

JSON = "application/json"

PARAMS = {"max_new_tokens": 2, "temperature": 0.0}
MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
# Of one pixel.
IMAGE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGNgZGIGAAAOAAfXb+R4AAAAAElFTkSuQmCC"
)
SHOWN = [
    {"role": "user", "content": [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": IMAGE}}]}
]
# Valid and cheap, several per path; those with images where there is an encoder.
VALID: dict[str, list[dict[str, Any]]] = {
    "/inference/v1/generate": [
        {
            "token_ids": [1, 2, 3],
            "sampling_params": {"max_tokens": 2, "temperature": 0.0, "top_k": 3, "stop": ["x"], "logprobs": 1},
            "request_id": "fuzz",
        },
    ],
    "/generate": [
        {"text": "abc", "sampling_params": PARAMS, "rid": "fuzz", "return_routed_experts": True},
        {"text": ["a", "bc"], "sampling_params": [PARAMS, {**PARAMS, "n": 2}], "rid": ["fuzz", "fuzy"]},
        {
            "input_ids": [1, 2, 3],
            "sampling_params": {
                **{**PARAMS, "temperature": 0.9, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "sampling_seed": 1, "n": 2},
                **{"frequency_penalty": 0.5, "presence_penalty": 0.5, "repetition_penalty": 1.1, "stop": ["x"]},
                **{"logit_bias": {"5": 1.0}, "stop_token_ids": [7], "min_new_tokens": 1, "ignore_eos": True},
            },
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": 3,
            "stream": True,
            "return_routed_experts": True,
            "routed_experts_start_len": 1,
            "routed_experts_format": "compact",
            "stream_routed_experts": True,
            "return_router_weights": True,
        },
        {"input_ids": [[1], [2, 3]], "sampling_params": PARAMS, "priority": 1, "extra_key": "k", "session_id": "s"},
        {"text": "<|user|>", "split_special_tokens": True, "sampling_params": PARAMS},
        {"text": "<|image_pad|> a <|image_pad|>", "image_data": [IMAGE, IMAGE], "sampling_params": PARAMS},
        {"text": ["a", "<|image_pad|>"], "image_data": [None, [IMAGE]], "sampling_params": PARAMS, "stream": True},
    ],
    "/v1/completions": [
        {"prompt": "abc", "max_tokens": 2, "model": "m", "temperature": 0.5, "n": 2, "logprobs": 2, "echo": True},
        {
            "prompt": [[1, 2], [3]],
            "max_tokens": 2,
            "stream": True,
            "stream_options": {"include_usage": True},
            "stop": "x",
            "rid": "fuzz",
            "return_routed_experts": True,
            "routed_experts_start_len": [0, 1],
        },
    ],
    "/v1/chat/completions": [
        {"messages": MESSAGES, "max_tokens": 2, "chat_template_kwargs": {"x": 1}, "logprobs": True, "top_logprobs": 2},
        {"messages": MESSAGES, "max_completion_tokens": 2, "max_tokens": 2, "stream": True, "return_meta_info": True},
        {"input_ids": [1, 2], "max_tokens": 2, "n": 2, "seed": 3, "return_routed_experts": True},
        {"messages": MESSAGES, "max_tokens": 2, "split_special_tokens": True},
        {"messages": SHOWN, "max_tokens": 2, "return_routed_experts": True},
    ],
    "/tokenize": [{"prompt": "abc"}, {"prompt": ["a", "b"], "add_special_tokens": False, "model": "m"}],
    "/detokenize": [{"tokens": [1, 2]}, {"tokens": [[1], [2]], "skip_special_tokens": False}],
    "/abort_request": [{"rid": "nobody"}, {"rid": "fuzz", "abort_all": False}],
}
WEIGHTS = {"/generate": 5, "/v1/completions": 3, "/v1/chat/completions": 3}

DEEP = "@deep list@"
DEEP_OBJECT = "@deep object@"
LONG_NUMBER = "@long number@"
RAW = {
    DEEP: "[" * 2000 + "]" * 2000,
    DEEP_OBJECT: '{"a":' * 2000 + "1" + "}" * 2000,
    LONG_NUMBER: "9" * 5000,
}
HOSTILE: list[Any] = [
    *(None, True, False, 0, 1, 2, -1, -(2**31), 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 2**70, -(2**70), 10**400),
    *(0.5, -0.5, -0.0, 1e-308, 1e308, -1e308, float("nan"), float("inf"), -float("inf"), LONG_NUMBER),
    *(
        "",
        "x",
        "1",
        "-1",
        "nan",
        "\0",
        "\ud800",
        "a\udfff",
        "\U0001f600",
        "\ufeff",
        "é" * 600,
        "{{ 7 * 7 }}",
        "\r\n\r\n",
    ),
    *([], {}, [[]], [None], [""], ["\ud800"], [1], [-1], [2**70], [1.5], [[1], 2], ["a", 1], [{}], [[[1]]]),
    *({"": 1}, {"a": 1}, {"5": 1e308}, {"5": float("nan")}, {"-1": 1}, {str(2**70): 1}, {"\ud800": 1}, {"self": 1}),
    *(DEEP, DEEP_OBJECT),
]
# Large ones are rare, so that the test's time goes into variety. A batch of so many prompts is more than may wait.
LARGE: list[Any] = ["x" * 100_000, "\0" * 20_000, [0] * 20_000, ["a"] * 5000, [[1]] * 5000, [{}] * 1000]
CONTENT_TYPES = [
    *("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/octet-stream"),
    *("", "json", "application/json; charset=utf-16", "application/vnd.api+json", "application/", "*/*"),
]
# Limits of output, never left out and never null: the defaults would be long answers.
LIMITS = ("max_new_tokens", "max_tokens", "max_completion_tokens")


@dataclass(frozen=True)
class Body:
    path: str
    content: bytes
    content_type: str = JSON

    def __str__(self) -> str:
        return f"{self.path} ({self.content_type}) {self.content[:300]!r}"


class Fuzzer:
    """Bodies without end, the same for the same seed."""

    def __init__(self, openapi: dict[str, Any], seed: int) -> None:
        self._random = random.Random(seed)
        self._count = 0
        self._fields = {path: sorted(properties(openapi, path)) for path in VALID}
        self._paths = list(VALID)
        self._weights = [WEIGHTS.get(path, 1) for path in self._paths]

    def __iter__(self) -> Iterator[Body]:
        while True:
            (path,) = self._random.choices(self._paths, self._weights)
            yield self._body(path)

    def _body(self, path: str) -> Body:
        choose = self._random
        self._count += 1
        value: Any = copy.deepcopy(choose.choice(VALID[path]))
        kind = choose.random()
        for _ in range(choose.choice((0, 1, 1, 2, 3)) if kind < 0.9 else 0):
            value = self._mutated(path, value)
        content = self._encoded(self._made_cheap(path, value))
        if kind < 0.9:
            return Body(path, content)
        if kind < 0.95:
            return Body(path, content, choose.choice(CONTENT_TYPES))
        return Body(path, self._damaged(content))

    def _hostile(self) -> Any:
        return copy.deepcopy(self._random.choice(LARGE if self._random.random() < 0.01 else HOSTILE))

    def _mutated(self, path: str, value: Any) -> Any:
        """`value` with one place changed."""
        choose = self._random
        if not isinstance(value, dict) or not value or choose.random() < 0.02:
            return self._hostile()
        action = choose.random()
        if action < 0.25:
            value[choose.choice(self._fields[path])] = self._hostile()
        elif action < 0.35:
            value[choose.choice(("colour", "", "\ud800", "__class__", "Text", "self", "x" * 3000))] = self._hostile()
        elif action < 0.45:
            value.pop(choose.choice(list(value)))
        else:
            self._mutate_inside(value)
        return value

    def _mutate_inside(self, container: Any) -> None:
        """Replace one value, at any depth."""
        while True:
            keys = list(container) if isinstance(container, dict) else range(len(container))
            key = self._random.choice(list(keys))
            inner = container[key]
            if not isinstance(inner, dict | list) or not inner or self._random.random() < 0.3:
                container[key] = self._hostile()
                return
            container = inner

    def _made_cheap(self, path: str, value: Any) -> Any:
        """What may be valid costs two tokens, has a rid of its own, and aborts nobody but requests of this test."""
        if not isinstance(value, dict):
            return value
        if path == "/abort_request":
            if str(value.get("abort_all")).lower() in ("true", "1", "1.0"):
                value["abort_all"] = 2
            return value
        if path == "/generate":
            if value.get("sampling_params") in (None, [], {}):
                value["sampling_params"] = dict(PARAMS)
            params = value["sampling_params"]
            for item in params if isinstance(params, list) else [params]:
                limit_output(item, "max_new_tokens")
        elif path.startswith("/v1"):
            limit_output(value, "max_tokens")
        if isinstance(value.get("rid"), str) and value["rid"].startswith("fuz"):
            value["rid"] = f"fuzz-{self._count}"
        elif isinstance(value.get("rid"), list):
            value["rid"] = [f"{rid}-{self._count}" if isinstance(rid, str) else rid for rid in value["rid"]]
        elif isinstance(value.get("rid"), str) and value["rid"]:
            value["rid"] += f"-{self._count}"
        return value

    @staticmethod
    def _encoded(value: Any) -> bytes:
        text = json.dumps(value)
        for marker, raw in RAW.items():
            text = text.replace(json.dumps(marker), raw)
        return text.encode()

    def _damaged(self, content: bytes) -> bytes:
        choose = self._random
        place = choose.randrange(len(content) + 1)
        match choose.randrange(8):
            case 0:
                return content[:place]
            case 1:
                return content[:place] + bytes([choose.choice((0xFF, 0xC0, 0x80, 0xED, 0))]) + content[place:]
            case 2:
                return choose.randbytes(choose.randrange(200))
            case 3:
                return content + content
            case 4:
                return content[place:]
            case 5:
                return b"\xef\xbb\xbf" + content
            case 6:
                return content.replace(b":", choose.choice((b"", b"::", b":-", b"=", b":0x")), 1)
            case _:
                return content[:place] + choose.randbytes(3) + content[place + 3 :]


def properties(openapi: dict[str, Any], path: str) -> dict[str, Any]:
    schema = openapi["paths"][path]["post"]["requestBody"]["content"][JSON]["schema"]
    return openapi["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]["properties"]


def limit_output(fields: Any, name: str) -> None:
    """Set the limit where it is missing or null; keep what is refused anyway."""
    if not isinstance(fields, dict):
        return
    for limit in LIMITS:
        if limit in fields and fields[limit] is None:
            fields[limit] = 2
    if not any(limit in fields for limit in LIMITS):
        fields[name] = 2


def fault_of(reply: httpx.Response) -> str | None:
    """What is wrong with an answer; None if it is in good form."""
    status = reply.status_code
    if reply.headers.get("connection", "").lower() == "close":
        return f"{status}, and the connection is to be closed"
    if status == 200:
        return fault_of_success(reply)
    if not 400 <= status < 500:
        return f"status {status}: {reply.text[:200]!r}"
    try:
        error = reply.json()["error"]
    except (ValueError, KeyError, TypeError):
        return f"{status} without an error object: {reply.text[:200]!r}"
    good = (
        set(error) == {"message", "type", "param", "code"}
        and isinstance(error["message"], str)
        and error["message"]
        and isinstance(error["type"], str)
        and isinstance(error["param"], str | None)
        and error["code"] == status
    )
    return None if good else f"{status} with a malformed error: {error}"


def fault_of_success(reply: httpx.Response) -> str | None:
    if reply.request.url.path == "/abort_request":
        return None if reply.content == b"" else f"abort answered {reply.text[:200]!r}"
    if not reply.headers["content-type"].startswith("text/event-stream"):
        reply.json()
        return None
    events = [line.removeprefix("data: ") for line in reply.text.split("\n") if line]
    for event in events[:-1]:
        json.loads(event)
    return None if events[-1] == "[DONE]" else f"a stream without an end: {reply.text[-200:]!r}"
