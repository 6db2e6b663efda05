"""A client of the server: generates over HTTP, and hands on no routes that it has not verified.

```python
with Client("http://127.0.0.1:30000") as client:
    answer = client.generate([1, 2, 3], {"temperature": 0})
    answer.routes                                  # uint8 [rows, moe_layers, top_k]
    conversation = client.multi_turn({"temperature": 0})
    conversation.turn([1, 2, 3])                   # conversation.tokens, conversation.routes
```

`AsyncClient` is the same with `await`. Both only move requests and responses; what is asked and how an answer is read are
plain functions. What the network raises (`httpx.TransportError`) is passed on. Needs no torch.

Legend: R rows (tokens as inputs), M MoE layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import httpx

from .answer import (
    Delivery,
    Generation,
    RoutesError,
    ServerError,
    StartLen,
    build_request,
    http_options,
    make_generation,
    read_answer,
    read_choices,
)
from .control import EngineControl
from .conversation import AsyncConversation, Conversation, History
from .session import AsyncSession, Session, Turn

__all__ = [
    "AsyncClient",
    "AsyncConversation",
    "AsyncSession",
    "Client",
    "Conversation",
    "EngineControl",
    "Generation",
    "History",
    "RoutesError",
    "ServerError",
    "Session",
    "Turn",
]


class Client:
    """A connection to one server. `transport` replaces the network, as for tests."""

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._http = httpx.Client(**http_options(base_url, api_key, timeout_s), transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def generate(
        self,
        input_ids: Sequence[int] | None = None,
        sampling_params: Mapping[str, Any] | None = None,
        *,
        text: str | None = None,
        routed_experts: bool = True,
        start_len: StartLen = 0,
        delivery: Delivery = "inline",
        **fields: Any,
    ) -> Generation:
        """Answer one prompt, with the rows of the positions [start_len, prompt + completion - 1).

        With `start_len="auto"` and a `session_id` they begin where this session's last answers have brought them already.
        By reference the rows are fetched as raw bytes, not as base64 within the answer. `fields` are further fields of
        the request, as `rid` or `extra_key`; with `return_router_weights=True` the rows' combine weights come as well.

        Raises:
            ValueError: the arguments contradict each other; nothing was sent.
            ServerError: the server refused; 410: the rows expired before they were fetched.
            RoutesError: the routes are missing, damaged, or not those that were asked for.
        """
        request = build_request(input_ids, text, sampling_params, routed_experts, start_len, delivery, fields)
        answer, info, path = read_answer(request, self._http.post("/generate", json=request))
        return make_generation(request, answer, info, None if path is None else self._http.get(path))

    def samples(
        self,
        input_ids: Sequence[int],
        sampling_params: Mapping[str, Any] | None = None,
        *,
        n: int,
        start_len: StartLen = 0,
        **fields: Any,
    ) -> list[Generation]:
        """`n` answers to one prompt, with their rows; with `start_len="auto"` those of the prompt come with the first.

        Raises:
            ValueError, ServerError, RoutesError: as `generate`.
        """
        request = build_request(input_ids, None, sampling_params, True, start_len, "inline", fields, n)
        return read_choices(request, self._http.post("/generate", json=request), n)

    def session(self, session_id: str, sampling_params: Mapping[str, Any] | None = None, **fields: Any) -> Session:
        """A new session, of a name that nobody else uses; every turn takes these parameters and fields of `generate`."""
        return Session(self.samples, session_id, {"sampling_params": sampling_params, **fields})

    def multi_turn(self, sampling_params: Mapping[str, Any] | None = None, **fields: Any) -> Conversation:
        """A new conversation; every turn takes these parameters and fields of `generate`."""
        return Conversation(self.generate, {"sampling_params": sampling_params, **fields})


class AsyncClient:
    """As `Client`, with `await`."""

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = httpx.AsyncClient(**http_options(base_url, api_key, timeout_s), transport=transport)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def generate(
        self,
        input_ids: Sequence[int] | None = None,
        sampling_params: Mapping[str, Any] | None = None,
        *,
        text: str | None = None,
        routed_experts: bool = True,
        start_len: StartLen = 0,
        delivery: Delivery = "inline",
        **fields: Any,
    ) -> Generation:
        """As `Client.generate`."""
        request = build_request(input_ids, text, sampling_params, routed_experts, start_len, delivery, fields)
        answer, info, path = read_answer(request, await self._http.post("/generate", json=request))
        return make_generation(request, answer, info, None if path is None else await self._http.get(path))

    async def samples(
        self,
        input_ids: Sequence[int],
        sampling_params: Mapping[str, Any] | None = None,
        *,
        n: int,
        start_len: StartLen = 0,
        **fields: Any,
    ) -> list[Generation]:
        """As `Client.samples`."""
        request = build_request(input_ids, None, sampling_params, True, start_len, "inline", fields, n)
        return read_choices(request, await self._http.post("/generate", json=request), n)

    def session(self, session_id: str, sampling_params: Mapping[str, Any] | None = None, **fields: Any) -> AsyncSession:
        """As `Client.session`."""
        return AsyncSession(self.samples, session_id, {"sampling_params": sampling_params, **fields})

    def multi_turn(self, sampling_params: Mapping[str, Any] | None = None, **fields: Any) -> AsyncConversation:
        """As `Client.multi_turn`."""
        return AsyncConversation(self.generate, {"sampling_params": sampling_params, **fields})
