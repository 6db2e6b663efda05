"""What a web page may not send to a server that its reader can reach."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from waybill.engine.config import EngineConfig
from waybill.engine.control.operations import Operation
from waybill.engine.entrypoints.api_keys import ApiKeys
from waybill.engine.entrypoints.http_limits import HttpLimits
from waybill.engine.entrypoints.http_server import make_app
from waybill.engine.entrypoints.origin_guard import AllowedHosts
from waybill.engine.entrypoints.service_metrics import ServiceMetrics
from waybill.engine.frontend.work_threads import WorkThreads
from waybill.engine.ipc.frontend_messages import ControlReply

LOOPBACK = AllowedHosts("127.0.0.1", ("localhost", "box", "waybill.example", "*.cluster.local"))
OPEN = AllowedHosts("0.0.0.0", ("box",))
IPV6 = AllowedHosts("::1", ())
EVIL = "https://evil.example"
ROUTES = [("POST", "/flush_cache"), ("POST", "/pause_generation"), ("POST", "/release_memory_occupation")]
EVERYWHERE = [*ROUTES, ("GET", "/health"), ("GET", "/metrics"), ("GET", "/nowhere"), ("OPTIONS", "/generate")]


class FakeControls:
    """Takes note of what reaches the engine."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    async def run(self, operation: Operation) -> ControlReply:
        self.calls.append(operation.route().removeprefix("/"))
        return ControlReply("op", True, "done")


@lru_cache
def application(hosts: AllowedHosts, origins: tuple[str, ...], keys: tuple[str, ...]) -> tuple[FastAPI, FakeControls]:
    controls = FakeControls()
    manager: Any = SimpleNamespace(
        controls=controls,
        work_threads=WorkThreads(),
        not_ready=lambda: None,
        get_state=None,
        config=EngineConfig(model_path=""),
        images=None,
    )
    app = make_app(
        manager,
        None,
        ServiceMetrics(),
        model_name="m",
        api_keys=ApiKeys(keys),
        allowed_hosts=hosts,
        allowed_origins=origins,
        limits=HttpLimits(),
        health_timeout_s=1.0,
    )
    return app, controls


def ask(
    method: str,
    path: str,
    *,
    host: str = "127.0.0.1:30000",
    hosts: AllowedHosts = LOOPBACK,
    origins: Sequence[str] = (),
    keys: Sequence[str] = (),
    **headers: str,
) -> tuple[httpx.Response, list[str]]:
    """The whole application's answer, and what the engine was told to do."""
    app, controls = application(hosts, tuple(origins), tuple(keys))
    controls.calls.clear()

    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:30000") as client:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            return await client.request(method, path, headers={"Host": host, **named})

    return asyncio.run(call()), list(controls.calls)


@pytest.mark.parametrize(("method", "path"), EVERYWHERE)
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": EVIL},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:8888"},
        {"Origin": "http://127.0.0.1"},
        {"Origin": "https://127.0.0.1:30000.evil.example"},
        {"Origin": "file://127.0.0.1:30000"},
        {"Origin": ""},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"host": "evil.example"},
        {"host": "evil.example:30000", "Origin": "http://evil.example:30000"},
        {"host": "localhost.evil.example"},
        {"host": "0.0.0.0:30000"},
        {"host": "10.0.0.1"},
        {"host": "cluster.local"},
        {"host": ""},
    ],
    ids=str,
)
def test_pages_of_others_and_names_of_others_are_refused_everywhere(
    method: str, path: str, headers: dict[str, str]
) -> None:
    reply, calls = ask(method, path, **headers)
    assert reply.status_code == 403 and calls == []
    assert reply.json()["error"]["type"] == "PermissionDeniedError"
    assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"host": "localhost:30000"},
        {"host": "LOCALHOST"},
        {"host": "127.1.2.3:9"},
        {"host": "[::1]:30000"},
        {"host": "box"},
        {"host": "waybill.example."},
        {"host": "gpu-7.cluster.local:80"},
        {"Origin": "http://127.0.0.1:30000"},
        {"host": "waybill.example", "Origin": "https://waybill.example"},
        {"Sec_Fetch_Site": "same-origin", "Origin": "http://127.0.0.1:30000"},
        {"Sec_Fetch_Site": "none"},
    ],
    ids=str,
)
def test_clients_and_own_pages_pass(headers: dict[str, str]) -> None:
    reply, calls = ask("POST", "/flush_cache", **headers)
    assert reply.status_code == 200 and calls == ["flush_cache"]


@pytest.mark.parametrize("host", ["10.1.2.3:30000", "[2001:db8::1]", "localhost", "box"])
def test_off_loopback_any_literal_address_is_served(host: str) -> None:
    """Health checks, containers and forwarded ports use addresses that the server does not know of."""
    assert ask("GET", "/health", host=host, hosts=OPEN)[0].status_code == 200
    assert ask("POST", "/flush_cache", host="evil.example", hosts=OPEN)[0].status_code == 403


def test_ipv6_loopback() -> None:
    assert ask("GET", "/health", host="[::1]:5", hosts=IPV6)[0].status_code == 200
    assert ask("GET", "/health", host="[2001:db8::1]:5", hosts=IPV6)[0].status_code == 403


def test_any_name_can_be_allowed() -> None:
    hosts = AllowedHosts("127.0.0.1", ("*",))
    assert ask("GET", "/health", host="any.example", hosts=hosts)[0].status_code == 200
    assert ask("POST", "/flush_cache", host="any.example", hosts=hosts, Origin=EVIL)[0].status_code == 403


def test_an_image_cannot_flush_the_cache_where_the_browser_tells_nothing() -> None:
    agent = {"User_Agent": "Mozilla/5.0 (X11; Linux x86_64)"}
    assert ask("GET", "/flush_cache", host="10.1.2.3", hosts=OPEN, **agent)[0].status_code == 403
    assert ask("GET", "/flush_cache", **agent, Sec_Fetch_Site="none")[1] == ["flush_cache"]
    assert ask("GET", "/flush_cache")[1] == ["flush_cache"]


@pytest.mark.parametrize("headers", [{"Origin": EVIL}, {"host": "evil.example"}], ids=str)
def test_a_key_is_what_no_page_has(headers: dict[str, str]) -> None:
    reply, calls = ask("POST", "/flush_cache", keys=["k"], Authorization="Bearer k", **headers)
    assert reply.status_code == 200 and calls == ["flush_cache"]
    assert ask("POST", "/flush_cache", keys=["k"], **headers)[0].status_code == 403
    assert ask("GET", "/metrics", keys=["k"], **headers)[0].status_code == 403


def test_nothing_leads_where_the_host_header_says() -> None:
    for path in ("/generate/", "/flush_cache/", "/v1/models/"):
        reply, _ = ask("GET", path)
        assert reply.status_code in (404, 405, 501) and "location" not in reply.headers


def test_an_allowed_page_is_answered_before_and_after_it_asks() -> None:
    origins = ["https://app.example"]
    page = {"Origin": "https://app.example", "Sec_Fetch_Site": "cross-site"}
    preflight, calls = ask(
        "OPTIONS",
        "/flush_cache",
        origins=origins,
        keys=["k"],
        Access_Control_Request_Method="POST",
        Access_Control_Request_Headers="authorization",
        **page,
    )
    assert preflight.status_code == 200 and calls == []
    assert preflight.headers["access-control-allow-origin"] == "https://app.example"
    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
    reply, calls = ask("POST", "/flush_cache", origins=origins, **page)
    assert calls == ["flush_cache"] and reply.headers["access-control-allow-origin"] == "https://app.example"
    refused, _ = ask("POST", "/flush_cache", origins=origins, keys=["k"], **page)
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://app.example"
    assert ask("POST", "/flush_cache", origins=origins, Origin=EVIL)[0].status_code == 403
    assert ask("POST", "/flush_cache", origins=["*"], Origin=EVIL)[1] == ["flush_cache"]
