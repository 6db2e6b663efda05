"""Endpoints of other servers: what is served of them, and what says what to use in its place."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from waybill.engine.config import EngineConfig
from waybill.engine.control.blocked import Blocked, BlockedKind
from waybill.engine.entrypoints.bodies import BodyReader
from waybill.engine.entrypoints.errors import install_error_handlers
from waybill.engine.entrypoints.info import info_router
from waybill.engine.entrypoints.not_served import NOT_SERVED, not_served_router
from waybill.engine.entrypoints.update_sessions import update_sessions_router
from waybill.engine.frontend.request_observer import NoObserver
from waybill.engine.frontend.work_threads import WorkThreads

RANK = {"num_running": 2, "num_waiting": 3, "num_pages": 10, "num_free_pages": 4}
STATE: dict[str, Any] = {
    "page_size": 16,
    "kv_cache_tokens": 160,
    "weight_version": "v",
    "transferred_bytes": 8,
    "transferred_shared_bytes": 3,
    "transferred_nixl_bytes": 1,
    "dp_ranks": [RANK, RANK],
}


def client_of(**facts: Any) -> TestClient:
    async def get_state() -> dict[str, Any]:
        return STATE

    manager: Any = SimpleNamespace(
        **{
            "config": EngineConfig(model_path="m", tp_size=2, dp_size=2),
            "facts": {"context_length": 64, "model_type": "qwen3_moe"},
            "queries": SimpleNamespace(claims_address="ipc://claims"),
            "get_state": get_state,
            "not_ready": lambda: None,
            "why_requests_wait": lambda: None,
            "images": None,
            "blocked": None,
            **facts,
        }
    )
    app = FastAPI(redirect_slashes=False)
    install_error_handlers(app)
    app.include_router(info_router(manager, None, "served", 1.0))  # type: ignore[arg-type]
    app.include_router(update_sessions_router(manager, BodyReader(WorkThreads(), 1000, NoObserver())))
    app.include_router(not_served_router())
    return TestClient(app, raise_server_exceptions=False)


@pytest.mark.parametrize("path", NOT_SERVED)
def test_what_is_not_served_says_what_to_use(path: str) -> None:
    client = client_of()
    for method in ("GET", "POST"):
        reply = client.request(method, path.replace("{rest:path}", "r/cancel"), content=b"{")
        assert reply.status_code == 501
        error = reply.json()["error"]
        assert error["type"] == "NotImplementedError" and error["message"].startswith(path.partition("{")[0])


def test_every_hint_names_what_exists() -> None:
    """What a hint says to use is no endpoint that is not served."""
    for hint in NOT_SERVED.values():
        named = {word.strip(",.;") for word in hint.split() if word.startswith("/")}
        assert not named & NOT_SERVED.keys(), hint


def test_health_in_the_words_of_others() -> None:
    client = client_of()
    for path in ("/health", "/ping", "/ready"):
        assert client.get(path).status_code == 200
    assert client.head("/health").status_code == 200
    paused = client_of(why_requests_wait=lambda: "paused")
    assert paused.get("/ready").status_code == 503 and paused.get("/ping").status_code == 200
    starting = client_of(not_ready=lambda: "starting")
    assert {starting.get(path).status_code for path in ("/health", "/ping", "/ready")} == {503}


def test_a_model_by_its_name() -> None:
    client = client_of()
    card = client.get("/v1/models/served").json()
    assert [card] == client.get("/v1/models").json()["data"]
    reply = client.get("/v1/models/org/other")
    assert reply.status_code == 404 and reply.json()["error"]["param"] == "model"


def test_loads_in_both_forms() -> None:
    client = client_of()
    assert client.get("/get_load").json() == [
        {"dp_rank": rank, "num_reqs": 5, "num_waiting_reqs": 3, "num_tokens": 96} for rank in (0, 1)
    ]
    assert [load["num_total_reqs"] for load in client.get("/v1/loads").json()["loads"]] == [5, 5]


def test_server_info_has_what_slime_and_miles_read() -> None:
    """slime, slime/backends/sglang_utils/external.py and sglang_engine.py (`_init_external`); miles has the same."""
    info = client_of().get("/server_info").json()
    assert info["disaggregation_transports"] == ["shared", "nixl", "tcp"]
    assert info["num_gpus"] == 4 and info["pp_size"] == 1 and info["tp_size"] == 2 and info["ep_size"] == 4
    assert info["enable_memory_saver"] is False and info["enable_metrics"] is True
    assert info["enable_return_routed_experts"] is False and info["disaggregation_mode"] == "null"
    assert info["max_total_num_tokens"] == 160 and len(info["internal_states"]) == 2


def test_sessions_around_an_update() -> None:
    client = client_of()
    for body in ({}, {"selector": "all"}, {"selector": None}):
        assert client.post("/begin_weight_update", json=body).json()["success"]
    assert client.post("/begin_weight_update", json={"selector": "draft"}).status_code == 400
    assert client.post("/end_weight_update").json()["success"] and client.post("/end_weight_update", json={}).is_success
    flags = {"restore_weights_before_load": True, "post_process_quantization": False}
    assert client.post("/post_process_weights", json=flags).json()["success"]


@pytest.mark.parametrize("kind", BlockedKind)
def test_the_end_of_a_session_says_what_is_missing(kind: BlockedKind) -> None:
    """But not that memory is released: a trainer on the same devices takes the KV cache back behind the update."""
    reply = client_of(blocked=Blocked(kind, "weights: 3 are missing")).post("/end_weight_update", json={})
    assert reply.is_success == (kind is BlockedKind.RELEASED)
    if not reply.is_success:
        assert reply.json()["message"] == reply.json()["error"]["message"] == "weights: 3 are missing"
