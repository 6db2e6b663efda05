"""The page at `/` and its events: what they say, who may have them, and that nothing happens while nobody looks."""

from __future__ import annotations

import asyncio
import base64
import copy
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from fastapi import FastAPI
from support.http_service import HttpService, served, wait_until

from waybill.engine.config import EngineConfig
from waybill.engine.entrypoints.api_keys import ApiKeys
from waybill.engine.entrypoints.errors import install_error_handlers
from waybill.engine.entrypoints.http_limits import HttpLimits
from waybill.engine.entrypoints.live_page import page_routes
from waybill.engine.entrypoints.live_page.live_event import LiveEvent, engine_now
from waybill.engine.entrypoints.live_page.live_feed import MAX_VIEWERS, LiveFeed
from waybill.engine.entrypoints.live_page.page_routes import PAGE_PATHS, page_router
from waybill.engine.entrypoints.live_page.recent_requests import NUM_RECENT, SHOWN_RID_CHARS, RecentRequests
from waybill.engine.entrypoints.origin_guard import AllowedHosts, OriginGuard
from waybill.engine.entrypoints.request_guard import RequestGuard
from waybill.engine.ipc.output_queries import ExpertLoadReply

FOLDER = Path(page_routes.__file__).parent
RANK = {"num_running": 2, "num_waiting": 3, "num_pages": 10, "num_free_pages": 4, "num_cached_pages": 1, "num_steps": 5}
STATE: dict[str, Any] = {
    **{
        "is_blocked": 0,
        "is_paused": 0,
        "blocked": "",
        "weight_version": "v1",
        "num_weight_updates": 1,
        "page_size": 16,
    },
    **{"num_output_tokens": 100, "num_retractions": 0, "routed_experts_rows_filed": 50, "routing_ring_slots": 8},
    **{"routed_experts_rows_shipped": 40, "routed_experts_bytes_shipped": 400, "routed_experts_refused": 0},
    "routing_ring_occupied": 1,
    "dp_ranks": [{**RANK, "max_step_s": 0.5}, {**RANK, "max_step_s": 0.25}],
    "sync_waits": [{"rank": 0, "straggler": 1, "cause": "prefill", "seconds": 1.0, "steps": 4}],
}
LOAD = ExpertLoadReply("op", (1, 3), 4, 6, np.array([[6, 4, 2, 0], [0, 70_000, 1, 2]], "<u4").tobytes())


class Desk:
    """A feed over an engine that counts how often it is asked."""

    def __init__(self, *keys: str) -> None:
        self.num_questions = 0
        self.error: Exception | None = None
        queries = SimpleNamespace(get_expert_loads=self._loads)
        config = EngineConfig(model_path="m", tp_size=2, dp_size=2)
        manager: Any = SimpleNamespace(config=config, queries=queries, get_state=self._state, not_ready=lambda: None)
        self.recent = RecentRequests()
        self.feed = LiveFeed(manager, self.recent, "served", period_s=0.02)
        self.app = FastAPI()
        install_error_handlers(self.app)
        self.app.add_middleware(
            RequestGuard,
            api_keys=ApiKeys(keys),
            limits=HttpLimits(),
            not_ready=manager.not_ready,
            public_paths=PAGE_PATHS,
        )
        hosts = AllowedHosts("127.0.0.1")
        self.app.add_middleware(OriginGuard, api_keys=ApiKeys(keys), allowed_hosts=hosts, allowed_origins=())
        self.app.include_router(page_router(self.feed))

    async def _state(self, *, check_pages: bool) -> dict[str, Any]:
        assert not check_pages
        self.num_questions += 1
        if self.error is not None:
            raise self.error
        return STATE

    async def _loads(self) -> list[ExpertLoadReply]:
        return [LOAD]


@contextmanager
def desk_served(*keys: str) -> Iterator[tuple[Desk, HttpService]]:
    desk = Desk(*keys)
    with served(desk.app) as service:
        yield desk, service


@contextmanager
def viewing(service: HttpService, **headers: str) -> Iterator[Iterator[bytes]]:
    """The data of the events, as they come."""
    with httpx.stream("GET", service.url + "/events", headers=headers, timeout=20) as reply:
        assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/event-stream")
        lines = reply.iter_lines()
        yield (line.removeprefix("data: ").encode() for line in lines if line)


def test_rates_are_per_second_of_the_interval() -> None:
    later = copy.deepcopy(STATE)
    later["num_output_tokens"] += 30
    later["dp_ranks"][1]["num_steps"] += 10
    later["sync_waits"][0]["seconds"] += 0.5
    later["sync_waits"].append({"rank": 1, "straggler": 0, "cause": "control", "seconds": 0.1, "steps": 1})
    now = engine_now(later, STATE, 2.0, [LOAD, LOAD])
    assert now.tokens_per_s == 15 and now.routes.rows_shipped_per_s == 0
    assert [rank.step_ms for rank in now.ranks] == [None, 200.0]
    assert [(wait.rank, wait.straggler, wait.cause, wait.ms) for wait in now.waits] == [
        (0, 1, "prefill", 250.0),
        (1, 0, "control", 50.0),
    ]
    assert [rank.delays_ms for rank in now.ranks] == [50.0, 250.0] and now.ranks[0].waits_ms == 250.0


def test_without_an_earlier_state_or_after_a_restart_nothing_has_a_rate() -> None:
    assert engine_now(STATE, None, 0.0, []).tokens_per_s == 0
    older = {**STATE, "num_output_tokens": 10_000}
    assert engine_now(STATE, older, 1.0, []).tokens_per_s == 0


def test_loads_of_several_processors_add_up_and_fit_their_type() -> None:
    load = engine_now(STATE, None, 0.0, [LOAD, LOAD]).expert_load
    assert load is not None and load.num_rows == 12 and load.layer_ids == (1, 3)
    counts = np.frombuffer(base64.b64decode(load.counts), "<u2").reshape(2, 4)
    assert counts.tolist() == [[12, 8, 4, 0], [0, 65535, 2, 4]]
    assert engine_now(STATE, None, 0.0, []).expert_load is None


@pytest.mark.parametrize(
    ("fields", "state"), [({"is_paused": 1}, "paused"), ({"is_blocked": 1}, "blocked"), ({}, "ready")]
)
def test_the_state_of_the_engine(fields: dict[str, int], state: str) -> None:
    assert engine_now({**STATE, **fields}, None, 0.0, []).state == state


def test_events_have_the_form_that_the_page_reads() -> None:
    with desk_served() as (desk, service), viewing(service) as events:
        first, second = (msgspec.json.decode(next(events), type=LiveEvent) for _ in range(2))
        assert first.engine is not None and first.engine.interval_s == 0.0 and first.model == "served"
        assert second.engine is not None and second.engine.interval_s > 0 and second.viewers == 1
        assert desk.feed.is_active


def test_every_field_that_the_page_reads_is_in_an_event() -> None:
    script = (FOLDER / "page.js").read_text()
    event = json.loads(msgspec.json.encode(engine_now(STATE, STATE, 1.0, [LOAD])))
    for name, fields in (("engine", event), ("rank", event["ranks"][0]), ("routes", event["routes"])):
        read = set(re.findall(rf"\b{name}\.([a-z_]+)", script))
        assert read and read <= fields.keys() | {"ranks"}, read - fields.keys()


def test_nobody_asks_the_engine_for_nobody() -> None:
    with desk_served() as (desk, service):
        time.sleep(0.1)
        assert desk.num_questions == 0
        with viewing(service) as events:
            next(events)
        wait_until(lambda: not desk.feed.is_active, "the viewer left")
        asked = desk.num_questions
        time.sleep(0.1)
        assert desk.num_questions <= asked + 1
        with viewing(service) as events:
            assert next(events)


def test_an_engine_that_does_not_answer_is_said_so() -> None:
    with desk_served() as (desk, service):
        desk.error = TimeoutError()
        with viewing(service) as events:
            event = msgspec.json.decode(next(events), type=LiveEvent)
            assert event.engine is None and "did not answer" in event.reason
            desk.error = None
            wait_until(lambda: msgspec.json.decode(next(events), type=LiveEvent).engine is not None, "it answers")


def test_a_fault_ends_the_streams() -> None:
    with desk_served() as (desk, service):
        desk.error = ZeroDivisionError()
        with pytest.raises(httpx.HTTPError), viewing(service) as events:
            list(events)


def test_viewers_are_bounded() -> None:
    desk = Desk()

    async def fill() -> None:
        for _ in range(MAX_VIEWERS):
            desk.feed.join()
        transport = httpx.ASGITransport(desk.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            reply = await client.get("/events")
        assert reply.status_code == 503 and "16 pages are open" in reply.json()["error"]["message"]
        for _ in range(MAX_VIEWERS):
            desk.feed.leave()
        assert not desk.feed.is_active

    asyncio.run(fill())


def test_streams_end_when_the_server_does() -> None:
    desk = Desk()

    async def run() -> None:
        desk.feed.join()
        events = desk.feed.events()
        await anext(events)
        desk.feed.close()
        async with asyncio.timeout(20):
            assert len([event async for event in events]) <= 1
        desk.feed.leave()
        transport = httpx.ASGITransport(desk.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            assert (await client.get("/events")).status_code == 503

    asyncio.run(run())


def test_files_are_public_and_data_needs_the_key() -> None:
    with desk_served("k") as (desk, service):
        for path in PAGE_PATHS:
            assert httpx.get(service.url + path).status_code == 200
        assert httpx.get(service.url + "/events").status_code == 401 and desk.num_questions == 0
        with viewing(service, Authorization="Bearer k") as events:
            assert next(events)


def test_pages_of_others_get_nothing() -> None:
    with desk_served() as (desk, service):
        for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
            for path in ("/", "/events"):
                assert httpx.get(service.url + path, headers=headers).status_code == 403
        assert desk.num_questions == 0


def test_nothing_inline_and_nothing_from_elsewhere() -> None:
    with desk_served() as (_, service):
        page = httpx.get(service.url + "/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    assert not re.findall(r"<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=|https?://", page.text)
    loaded = set(re.findall(r'(?:src|href)="([^":]+)"', page.text))
    assert {"/" + name for name in loaded} == set(PAGE_PATHS) - {"/"}
    for script in FOLDER.glob("*.js"):
        assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", script.read_text())
    ids = set(re.findall(r'\bid="([\w-]+)"', page.text))
    scripts = "".join(script.read_text() for script in FOLDER.glob("*.js"))
    used = set(re.findall(r'(?:byId|setText|fillRows|drawLine|drawMap)\("([\w-]+)"', scripts))
    assert used and used <= ids, used - ids


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_scripts_are_valid() -> None:
    for script in FOLDER.glob("*.js"):
        subprocess.run(["node", "--check", str(script)], check=True)


def test_requests_are_remembered_bounded() -> None:
    recent = RecentRequests()
    for number in range(NUM_RECENT + 5):
        answer: Any = SimpleNamespace(
            rid=f"{number}" + "x" * 500,
            prompt_tokens=1,
            cached_tokens=0,
            completion_tokens=2,
            began=time.perf_counter(),
            routed_experts_error=None,
        )
        recent.on_end(answer, "stop")
    requests = recent()
    assert len(requests) == NUM_RECENT and requests[0].rid.startswith("24") and len(requests[0].rid) == SHOWN_RID_CHARS
