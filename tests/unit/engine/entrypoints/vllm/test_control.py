"""The calls of vLLM's clients, in their order, over an engine that writes down what it is told."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from waybill.engine.config import EngineConfig
from waybill.engine.control.blocked import Blocked, BlockedKind
from waybill.engine.control.operations import (
    ContinueGeneration,
    DestroyWeightsUpdateGroup,
    FlushCache,
    InitWeightsUpdateGroup,
    PauseGeneration,
    ResumeMemoryOccupation,
    UpdateWeightsFromDisk,
    UpdateWeightsFromDistributed,
    UpdateWeightVersion,
)
from waybill.engine.entrypoints.bodies import BodyReader
from waybill.engine.entrypoints.errors import install_error_handlers
from waybill.engine.entrypoints.vllm.control import vllm_control_router
from waybill.engine.frontend.request_observer import NoObserver
from waybill.engine.frontend.work_threads import WorkThreads
from waybill.engine.ipc.frontend_messages import ControlReply

TENSORS: dict[str, Any] = {"names": ["a", "b"], "dtype_names": ["bfloat16", "float32"], "shapes": [[2, 3], [4]]}
INIT = {"master_address": "127.0.0.1", "master_port": 29500, "rank_offset": 1, "world_size": 5}


class Engine:
    """Four ranks, which do everything they are told, unless `refuses` says why not."""

    def __init__(self) -> None:
        self.config = EngineConfig(model_path="m", tp_size=2, dp_size=2)
        self.controls = self
        self.done: list[Any] = []
        self.refuses: str | None = None
        self.hangs_on: type[Any] | None = None
        self.blocked: Blocked | None = None
        self.is_paused = False

    async def run(self, operation: Any) -> ControlReply:
        operation.check()
        self.done.append(operation)
        if self.hangs_on is not None and isinstance(operation, self.hangs_on):
            raise TimeoutError
        if isinstance(operation, PauseGeneration | ContinueGeneration):
            self.is_paused = isinstance(operation, PauseGeneration)
        return ControlReply("op", self.refuses is None, self.refuses or "done")

    async def pause_when_idle(self) -> ControlReply:
        self.done.append("pause when idle")
        return ControlReply("op", True, "paused")

    async def release_memory(self, tags: Any, *, aborts: bool) -> ControlReply:
        self.done.append(("abort and release" if aborts else "release", tags))
        return ControlReply("op", True, "released")

    async def abort_exactly(self, rids: Any) -> int:
        self.done.append(("abort", rids))
        return 3

    async def get_state(self) -> dict[str, Any]:
        return {"weight_version": "v7"}


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def http(engine: Engine) -> TestClient:
    app = FastAPI(redirect_slashes=False)
    install_error_handlers(app)
    manager: Any = engine
    app.include_router(vllm_control_router(manager, BodyReader(WorkThreads(), 1000, NoObserver())))
    return TestClient(app, raise_server_exceptions=False)


def kinds(engine: Engine) -> list[Any]:
    return [one if isinstance(one, str | tuple) else type(one) for one in engine.done]


def error_of(reply: Any) -> str:
    assert reply.status_code == 400, reply.text
    message: str = reply.json()["error"]["message"]
    return message


def test_trl_async_grpo(http: TestClient, engine: Engine) -> None:
    """trl/experimental/async_grpo: vllm_client.py, weight_transfer.py."""
    assert http.get("/get_world_size").json() == {"world_size": 4}
    assert http.post("/init_weight_transfer_engine", json={"init_info": INIT}).status_code == 200
    assert http.post("/pause", params={"mode": "keep"}).json() == {"status": "paused"}
    assert http.get("/is_paused").json() == {"is_paused": True}
    assert http.post("/start_weight_update", json={"is_checkpoint_format": True}).status_code == 200
    assert http.post("/update_weights", json={"update_info": {**TENSORS, "packed": True}}).status_code == 200
    assert http.post("/finish_weight_update").status_code == 200
    assert http.post("/resume").json() == {"status": "resumed"}
    assert engine.done == [
        DestroyWeightsUpdateGroup(),
        InitWeightsUpdateGroup("127.0.0.1", 29500, 1, 5),
        PauseGeneration("in_place"),
        UpdateWeightsFromDistributed(
            ["a", "b"], ["bfloat16", "float32"], [[2, 3], [4]], packed_bytes=1 << 30, flush_cache=False
        ),
        ContinueGeneration(),
    ]


def test_trl_with_a_newer_vllm(http: TestClient, engine: Engine) -> None:
    """trl 1.16, generation/vllm_client.py: `packed` stands in the init info."""
    init = {**INIT, "packed": True, "packed_buffer_size_bytes": 500}
    assert http.post("/init_weight_transfer_engine", json={"init_info": init}).status_code == 200
    assert http.post("/update_weights", json={"update_info": TENSORS}).status_code == 200
    assert engine.done[-1].packed_bytes == 500
    assert http.post("/reset_prefix_cache").json() == {"success": True}


def test_skyrl(http: TestClient, engine: Engine) -> None:
    """skyrl/backends/skyrl_train/inference_servers/remote_inference_client.py."""
    assert http.request("GET", "/get_world_size", json={}).json() == {"world_size": 4}
    assert http.post("/init_weight_transfer_engine", json={"init_info": INIT}).status_code == 200
    assert http.post("/pause", params={"mode": "keep", "clear_cache": "false"}).status_code == 200
    calls: list[dict[str, Any]] = [
        {"method": "skyrl_start_weight_update", "kwargs": {"is_checkpoint_format": True}},
        {"method": "update_weights_nccl", "kwargs": {"update_info": {**TENSORS, "packed": True}}},
        {"method": "skyrl_finish_weight_update"},
    ]
    for call in calls:
        assert http.post("/collective_rpc", json=call).json() == {"results": [None] * 4}
    assert http.post("/reset_prefix_cache", json={"reset_running_requests": True}).status_code == 200
    assert http.post("/resume").status_code == 200
    assert kinds(engine)[2:] == [
        *(PauseGeneration, UpdateWeightsFromDistributed, PauseGeneration, FlushCache, ContinueGeneration)
    ]
    assert http.post("/sleep", params={"level": "2", "tags": ["weights"]}).status_code == 200
    engine.blocked = Blocked(BlockedKind.RELEASED, "memory is released")
    assert http.get("/is_sleeping").json() == {"is_sleeping": True}
    assert http.get("/is_paused").json() == {"is_paused": True}
    assert http.post("/wake_up", params={"tags": ["weights"]}).status_code == 200
    assert engine.done[-2:] == [("abort and release", ["weights"]), ResumeMemoryOccupation(["weights"])]
    engine.blocked = None
    assert http.post("/wake_up").status_code == 200
    assert engine.done[-2:] == [ResumeMemoryOccupation(None), ContinueGeneration()]
    assert "method" in error_of(http.post("/collective_rpc", json={"method": "reload_weights"}))


@pytest.mark.parametrize(
    ("method", "kwargs", "words"),
    [
        ("skyrl_start_weight_update", {"is_checkpoint_format": False}, "kwargs.is_checkpoint_format: must be true"),
        ("skyrl_start_weight_update", {"level": 1}, "kwargs.level: is no field"),
        ("update_weights_nccl", {}, "kwargs.update_info: Field required"),
        ("update_weights_nccl", {"update_info": {**TENSORS, "x": 1}}, "kwargs.update_info.x: is no field"),
        ("skyrl_finish_weight_update", {"step": 1}, "kwargs.step: is no field"),
    ],
)
def test_what_a_method_does_not_take_is_refused(
    http: TestClient, engine: Engine, method: str, kwargs: dict[str, Any], words: str
) -> None:
    assert error_of(http.post("/collective_rpc", json={"method": method, "kwargs": kwargs})).startswith(words)
    assert not engine.done


def test_prime_rl(http: TestClient, engine: Engine) -> None:
    """src/prime_rl/utils/client.py, with weights in files."""
    assert http.post("/pause", params={"mode": "keep", "clear_cache": "false"}).status_code == 200
    assert http.post("/update_weights", json={"weight_dir": "/w/step_3"}).json()["status"] == "ok"
    assert http.post("/resume").status_code == 200
    update = UpdateWeightsFromDisk("/w/step_3", flush_cache=False)
    assert engine.done == [PauseGeneration("in_place"), update, ContinueGeneration()]
    assert "'filesystem'" in error_of(http.post("/update_weights", json={"weight_dir": None}))


def test_trl_vllm_serve(http: TestClient, engine: Engine) -> None:
    """trl/generation/vllm_client.py."""
    assert http.get("/get_world_size/").json() == {"world_size": 4}
    assert http.post("/reset_prefix_cache/").status_code == 200
    assert engine.done == [FlushCache()]


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({}, [PauseGeneration("abort"), FlushCache()]),
        ({"mode": "abort", "clear_cache": "false"}, [PauseGeneration("abort")]),
        ({"mode": "wait"}, ["pause when idle", FlushCache()]),
        ({"wait_for_inflight_requests": "true", "clear_cache": "0"}, ["pause when idle"]),
        ({"mode": "keep", "clear_cache": "true"}, [PauseGeneration("in_place")]),
    ],
)
def test_pauses(http: TestClient, engine: Engine, params: dict[str, str], told: list[Any]) -> None:
    assert http.post("/pause", params=params).status_code == 200
    assert engine.done == told


def test_the_end_of_an_update(http: TestClient, engine: Engine) -> None:
    assert http.post("/finish_weight_update", json={"weight_version": "v8"}).status_code == 200
    assert engine.done == [UpdateWeightVersion("v8", abort_all_requests=False)]
    engine.blocked = Blocked(BlockedKind.INCOMPLETE, "weights: 3 are missing")
    assert http.post("/finish_weight_update", json={"weight_version": "v9"}).status_code == 200
    assert engine.done[1:] == [
        UpdateWeightsFromDistributed([], [], [], is_last=True, weight_version="v9", flush_cache=False)
    ]
    engine.blocked = Blocked(BlockedKind.TORN, "weights: a transfer was torn")
    assert error_of(http.post("/finish_weight_update")) == "weights: a transfer was torn"
    assert http.get("/weight_info").json() == {"weight_version": "v7"}


@pytest.mark.parametrize("kind", [PauseGeneration, FlushCache])
def test_a_reset_that_is_not_answered_in_time_leaves_no_pause_behind(
    http: TestClient, engine: Engine, kind: type[Any]
) -> None:
    """The engine may do it later."""
    engine.hangs_on = kind
    assert http.post("/reset_prefix_cache", json={"reset_running_requests": True}).status_code == 503
    assert engine.done[-1] == ContinueGeneration() and not engine.is_paused


def test_aborts(http: TestClient, engine: Engine) -> None:
    assert http.post("/abort_requests", json={"request_ids": ["r1"]}).json() == {"status": "aborted", "aborted": 3}
    assert http.post("/abort_requests", json={}).status_code == 200
    assert engine.done == [("abort", ["r1"]), ("abort", None)]


@pytest.mark.parametrize(
    ("path", "params", "body", "words"),
    [
        ("/pause", {"mode": "soft"}, None, "mode=soft: must be one of abort, wait, keep"),
        ("/pause", {"clear_cache": "maybe"}, None, "clear_cache=maybe: must be true or false"),
        ("/pause", {"mod": "keep"}, None, "mod: is no parameter of this request, which has mode, "),
        ("/sleep", {"level": "2", "tag": "weights"}, None, "tag: is no parameter"),
        ("/wake_up", {"tag": "weights"}, None, "tag: is no parameter"),
        ("/reset_prefix_cache", {"mode": "keep"}, None, "mode: is no parameter"),
        ("/sleep", {}, None, "level=1: must be 2"),
        ("/sleep", {"level": "2", "mode": "keep"}, None, "mode='keep': memory is released only when nothing runs"),
        ("/wake_up", {"tags": "graphs"}, None, "tags=graphs: must be one of weights, kv_cache"),
        ("/start_weight_update", {}, {"is_checkpoint_format": False}, "is_checkpoint_format: must be true"),
        ("/update_weights", {}, {"update_info": {**TENSORS, "x": 1}}, "update_info.x: is no field"),
        (
            "/update_weights",
            {},
            {"update_info": {**TENSORS, "ipc_handles_pickled": "gAS"}},
            "ipc_handles_pickled is not",
        ),
        ("/update_weights", {}, {"update_info": {**TENSORS, "packed_buffer_size_bytes": 0}}, "must be at least 1"),
        ("/update_weights", {}, {}, "update_info, weight_dir: give exactly one of them"),
        ("/init_weight_transfer_engine", {}, {"init_info": {}}, "master_address: Field required"),
        ("/reset_prefix_cache", {"reset_external": "true"}, None, "reset_external: must be false"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    http: TestClient, engine: Engine, path: str, params: dict[str, str], body: Any, words: str
) -> None:
    assert words in error_of(http.post(path, params=params, json=body))
    assert not engine.done


def test_what_the_engine_refuses_is_a_refusal(http: TestClient, engine: Engine) -> None:
    engine.refuses = "names: the model has no a"
    for path in ("/pause?mode=keep", "/resume", "/wake_up", "/reset_prefix_cache"):
        assert error_of(http.post(path)) == engine.refuses
    assert error_of(http.post("/update_weights", json={"update_info": TENSORS})) == engine.refuses
