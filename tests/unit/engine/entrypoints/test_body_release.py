"""A running request holds no part of the bodies' budget: what waits and runs is bounded by admission."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from waybill.engine.entrypoints.api_keys import ApiKeys
from waybill.engine.entrypoints.http_limits import HttpLimits
from waybill.engine.entrypoints.http_server import make_app
from waybill.engine.entrypoints.origin_guard import AllowedHosts
from waybill.engine.entrypoints.request_guard import RequestGuard
from waybill.engine.entrypoints.service_metrics import ServiceMetrics
from waybill.engine.frontend.work_threads import WorkThreads


class SlowManager:
    """Prepares and generates as long as it is let; notes what the gate holds in each."""

    def __init__(self) -> None:
        self.work_threads = WorkThreads()
        self.gate: RequestGuard | None = None
        self.held: list[int] = []
        self.config = SimpleNamespace(model_path="m")
        self.controls = None

    def not_ready(self) -> None:
        return None

    def _note(self) -> None:
        assert self.gate is not None
        self.held.append(self.gate._budget.held_bytes)

    async def prepare(self, request: Any) -> Any:
        self._note()
        return SimpleNamespace(request=request, samples=[], release=lambda: None, delivered=None)

    async def generate(self, prepared: Any, *, form: str) -> Any:
        self._note()
        # What it answers is another test's matter.
        raise ValueError("stop: enough")
        yield {}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"), [("/generate", {"input_ids": [5] * 1000}), ("/v1/completions", {"prompt": [5] * 1000})]
)
def test_the_bytes_count_until_tokens_have_taken_their_place(path: str, body: dict[str, Any], stream: bool) -> None:
    manager: Any = SlowManager()
    app = make_app(
        manager,
        None,
        ServiceMetrics(),
        model_name="m",
        api_keys=ApiKeys(()),
        allowed_hosts=AllowedHosts("127.0.0.1"),
        allowed_origins=(),
        limits=HttpLimits(),
        health_timeout_s=1.0,
    )
    layer: Any = app.build_middleware_stack()
    app.middleware_stack = layer
    while not isinstance(layer, RequestGuard):
        layer = layer.app if hasattr(layer, "app") else layer._app
    manager.gate = layer

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1") as client:
            return await client.post(path, json={**body, "stream": stream})

    reply = asyncio.run(ask())
    manager.work_threads.close()
    assert "enough" in reply.text
    assert len(manager.held) == 2 and manager.held[0] > 1000 and manager.held[1] == 0
