"""A server whose routes are a function of position and token, and both clients of it."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import numpy as np

from waybill.client import AsyncClient, Client, Generation, History
from waybill.engine.routing import wire
from waybill.engine.routing.geometry import RouteGeometry

GEOMETRY = RouteGeometry(layer_ids=(1, 2, 4), num_layers_total=5, max_tokens=8, top_k=2, num_experts=64)
URL = "http://waybill.test/prefix"
KINDS = ("sync", "async")
PROMPT = [5, 6, 7, 8]
TURNS = [[10 * turn + offset for offset in range(1 + turn % 4)] for turn in range(1, 11)]


def route_table(tokens: list[int]) -> np.ndarray:
    """Rows [len(tokens), M, K]: row i depends on i and token i alone."""
    layers, slots = np.array(GEOMETRY.layer_ids)[:, None], np.arange(GEOMETRY.top_k)
    return np.stack([(7 * i + 3 * token + 5 * layers + slots) % 64 for i, token in enumerate(tokens)]).astype(np.uint8)


def sample(tokens: list[int], count: int) -> list[int]:
    ids: list[int] = []
    for _ in range(count):
        ids.append((31 * sum(tokens + ids) + len(tokens + ids)) % 1000)
    return ids


class FakeServer:
    """Answers as the contract says; `spoil` changes an answer before it goes out, `refusal` replaces it."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[httpx.Headers] = []
        self.claims: dict[str, wire.RoutedExperts] = {}
        self.finish: dict[str, Any] = {"type": "length", "length": 3}
        self.num_missing = 0
        self.spoil: Callable[[dict[str, Any]], None] = lambda meta_info: None
        self.spoil_block: Callable[[wire.RoutedExperts], wire.RoutedExperts] = lambda routed: routed
        self.refusal: Callable[[], httpx.Response] | None = None

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.headers.append(request.headers)
        path = request.url.path.removeprefix("/prefix")
        if path.startswith("/routed_experts/"):
            return self._block(path.removeprefix("/routed_experts/"))
        assert (request.method, path) == ("POST", "/generate")
        self.bodies.append(json.loads(request.content))
        return self.refusal() if self.refusal else self._answer(self.bodies[-1])

    def _answer(self, body: dict[str, Any]) -> httpx.Response:
        prompt = body["input_ids"] if "input_ids" in body else [ord(char) for char in body["text"]]
        output = sample(prompt, body["sampling_params"].get("max_new_tokens", 3))
        meta_info: dict[str, Any] = {
            "id": body.get("rid", "r"),
            "finish_reason": self.finish,
            "prompt_tokens": len(prompt),
            "completion_tokens": len(output),
            "cached_tokens": 1,
        }
        if body["return_routed_experts"]:
            assert body["routed_experts_format"] == "compact"
            meta_info |= self._routing(body, prompt + output, len(prompt + output) - bool(output))
        self.spoil(meta_info)
        return httpx.Response(200, json={"text": f"{len(output)} ids", "output_ids": output, "meta_info": meta_info})

    def _routing(self, body: dict[str, Any], tokens: list[int], num_inputs: int) -> dict[str, Any]:
        end = num_inputs - self.num_missing
        start = min(body["routed_experts_start_len"], end)
        routed = wire.encode(route_table(tokens)[start:end], start, GEOMETRY, [("v0", start, end)])
        fields = {"routed_experts_meta": msgspec.to_builtins(routed.meta), "routed_experts_start_len": start}
        if body["routed_experts_delivery"] == "reference":
            claim = f"claim/{len(self.claims)}?#"
            self.claims[claim] = routed
            return fields | {"routed_experts_claim": claim}
        return fields | {"routed_experts": base64.b64encode(routed.frame).decode("ascii")}

    def _block(self, claim: str) -> httpx.Response:
        if claim not in self.claims:
            return refusal(410, "the claim has expired")
        routed = self.spoil_block(self.claims[claim])
        meta = msgspec.json.encode(routed.meta).decode("ascii")
        return httpx.Response(200, content=bytes(routed.frame), headers={"X-Routed-Experts-Meta": meta})


def refusal(status: int, message: str, **headers: str) -> httpx.Response:
    error = {"message": message, "type": "BadRequestError", "param": None, "code": status}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.Response(status, json={"error": error}, headers=named)


def ask(kind: str, server: FakeServer, *args: Any, **fields: Any) -> Generation:
    """`generate` of either client."""

    async def ask_async() -> Generation:
        async with AsyncClient(URL, api_key="secret", transport=httpx.MockTransport(server)) as client:
            return await client.generate(*args, **fields)

    if kind == "async":
        return asyncio.run(ask_async())
    with Client(URL, api_key="secret", transport=httpx.MockTransport(server)) as client:
        return client.generate(*args, **fields)


def converse(
    kind: str, server: FakeServer, turns: list[list[int]], check: Callable[[History], None], **fields: Any
) -> History:
    """A conversation of either client; `check` sees it after every turn."""

    async def converse_async() -> History:
        async with AsyncClient(URL, transport=httpx.MockTransport(server)) as client:
            conversation = client.multi_turn({"max_new_tokens": 3}, **fields)
            for ids in turns:
                await conversation.turn(ids)
                check(conversation)
            return conversation

    if kind == "async":
        return asyncio.run(converse_async())
    with Client(URL, transport=httpx.MockTransport(server)) as client:
        conversation = client.multi_turn({"max_new_tokens": 3}, **fields)
        for ids in turns:
            conversation.turn(ids)
            check(conversation)
        return conversation


def no_rows(meta_info: dict[str, Any]) -> None:
    meta_info |= {"routed_experts": None, "routed_experts_error": "2 rows are missing"}


def more_tokens(meta_info: dict[str, Any]) -> None:
    """An answer that is consistent, but for more tokens than it has."""
    tokens = [0] * (meta_info["prompt_tokens"] + 4)
    meta_info["completion_tokens"] = 4
    start = meta_info["routed_experts_meta"]["start"]
    routed = wire.encode(route_table(tokens)[start:-1], start, GEOMETRY, [])
    meta_info["routed_experts_meta"] = msgspec.to_builtins(routed.meta)
    meta_info["routed_experts"] = base64.b64encode(routed.frame).decode("ascii")
