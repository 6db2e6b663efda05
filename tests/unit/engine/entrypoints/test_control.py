"""Control routes and the trainer's client over them, without an engine: what is refused before it is sent, and that what is
accepted can be sent.

The fuzz test of the whole server leaves these routes out: they pause, empty and replace what its neighbour asks. Here
hostile values meet them one by one.
"""

from __future__ import annotations

import errno
import json
import os
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from waybill.client import EngineControl
from waybill.engine.config import EngineConfig
from waybill.engine.control.operations import (
    CheckWeights,
    ContinueGeneration,
    ControlOperation,
    DestroyWeightsUpdateGroup,
    FlushCache,
    GetWeightsByName,
    InitWeightsUpdateGroup,
    PauseGeneration,
    ReleaseMemoryOccupation,
    ResumeMemoryOccupation,
    UpdateWeightsFromDisk,
    UpdateWeightsFromDistributed,
    UpdateWeightsFromTensor,
    UpdateWeightVersion,
)
from waybill.engine.entrypoints.bodies import BodyReader
from waybill.engine.entrypoints.control import control_router
from waybill.engine.entrypoints.errors import install_error_handlers
from waybill.engine.frontend.engine_controls import EngineControls
from waybill.engine.frontend.request_observer import NoObserver
from waybill.engine.frontend.work_threads import WorkThreads
from waybill.engine.ipc.frontend_messages import ControlReply, ControlReq

TENSORS: dict[str, Any] = {"names": ["a"], "dtypes": ["float32"], "shapes": [[2, 3]], "group_name": "g"}
VALID: dict[str, dict[str, Any]] = {
    "/update_weights_from_disk": {
        "model_path": "m",
        "weight_version": "v",
        "flush_cache": False,
        "load_format": "auto",
    },
    "/init_weights_update_group": {
        **{"master_address": "h", "master_port": 1, "rank_offset": 1, "world_size": 3},
        **{"group_name": "g", "backend": "gloo"},
    },
    "/destroy_weights_update_group": {"group_name": "g"},
    "/update_weights_from_distributed": {**TENSORS, "load_format": "flattened_bucket", "is_last": True},
    "/update_weights_from_tensor": {"path": "p", "weight_version": "v", "is_last": True, "abort_all_requests": True},
    "/get_weights_by_name": {"name": "a", "truncate_size": 3},
    "/update_weight_version": {"new_version": "v", "abort_all_requests": False},
    "/weights_checker": {"action": "compare", "skip_tensor_list": ["router"]},
    "/pause_generation": {"mode": "retract"},
    "/continue_generation": {},
    "/release_memory_occupation": {"tags": ["weights"]},
    "/resume_memory_occupation": {"tags": ["weights", "kv_cache"]},
}
HOSTILE: list[Any] = [
    *(None, True, 0, -1, 1.5, 2**31, 2**64, -(2**70), float("nan"), "", "x", "\0", "\ud800", "é" * 3000, [], {}),
    *([[]], [None], [""], ["\ud800"], [2**70], [[2**70]], [[-1]], [{}], {"a": 1}, ["weights", "x"]),
]


class FakeControls:
    """Takes every call, and keeps what a message to the ranks would hold."""

    def __init__(self, reply: ControlReply) -> None:
        self.reply = reply
        self.calls: list[ControlOperation] = []

    async def run(self, operation: ControlOperation) -> ControlReply:
        message = msgspec.msgpack.encode(ControlReq(1, "op", operation))
        assert msgspec.msgpack.decode(message, type=ControlReq).operation == operation
        self.calls.append(operation)
        payload: Any = [[1.0]] if isinstance(operation, GetWeightsByName) else {"a": "0"}
        return msgspec.structs.replace(self.reply, payload=msgspec.json.encode(payload))


def client_of(reply: ControlReply) -> tuple[TestClient, FakeControls]:
    controls = FakeControls(reply)
    app = FastAPI()
    install_error_handlers(app)
    bodies = BodyReader(WorkThreads(), 1000, NoObserver())
    app.include_router(control_router(SimpleNamespace(controls=controls), bodies))  # type: ignore[arg-type]
    return TestClient(app, raise_server_exceptions=False), controls


DONE = ControlReply("op", True, "done")
REFUSED = ControlReply("op", False, "weights: a transfer was torn (x)")


def test_every_route_of_the_router_is_among_these() -> None:
    client, _ = client_of(DONE)
    assert set(client.get("/openapi.json").json()["paths"]) == {*VALID, "/flush_cache"}


@pytest.mark.parametrize("path", VALID)
def test_replies(path: str) -> None:
    client, controls = client_of(DONE)
    reply = client.post(path, json=VALID[path])
    assert reply.status_code == 200 and len(controls.calls) == 1, reply.text
    client, _ = client_of(REFUSED)
    reply = client.post(path, json=VALID[path])
    assert reply.status_code == 400 and reply.json()["error"]["message"] == REFUSED.message


@pytest.mark.parametrize("path", VALID)
def test_hostile_bodies_are_refused_or_can_be_sent(path: str) -> None:
    client, controls = client_of(DONE)
    fields = [*VALID[path], "flush_cache", "weight_version", "is_async", "colour"]
    bodies = [{**VALID[path], field: value} for field in fields for value in HOSTILE]
    for body in [*bodies, *HOSTILE, {}]:
        controls.calls.clear()
        reply = client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
        assert reply.status_code in (200, 400), f"{reply.status_code}: {reply.text} of {body}"
        assert (reply.status_code == 200) == bool(controls.calls)
        if reply.status_code == 400:
            error = reply.json()["error"]
            assert set(error) == {"message", "type", "param", "code"} and error["message"]


@pytest.mark.parametrize(
    ("path", "fields", "words"),
    [
        ("/update_weights_from_disk", {"is_async": True}, "is_async is not supported"),
        ("/update_weights_from_disk", {"load_format": "dummy"}, "load_format='dummy': must be one of auto, delta"),
        ("/update_weights_from_disk", {"load_format": "delta"}, "base_version: a delta must name"),
        ("/update_weights_from_disk", {"base_version": "v1"}, "base_version: goes with load_format 'delta' alone"),
        (
            "/update_weights_from_distributed",
            {"load_format": "delta", "base_version": "v1"},
            "delta: a manifest goes with load_format 'delta'",
        ),
        ("/update_weights_from_distributed", {"delta": "{}"}, "delta: a manifest goes with load_format 'delta'"),
        ("/update_weights_from_distributed", {"manifest": {"a": 1}}, "manifest is not supported"),
        ("/update_weights_from_tensor", {"serialized_named_tensors": ["gASV"]}, "pickled tensors are not taken"),
        ("/update_weights_from_tensor", {"safetensors": "AAAA"}, "give exactly one of them"),
        ("/update_weights_from_tensor", {"load_format": "dummy"}, "load_format='dummy': must be one of auto"),
        ("/update_weights_from_distributed", {"selector": "draft"}, "selector is not supported: must be 'all'"),
        ("/weights_checker", {"allow_quant_error": True}, "allow_quant_error is not supported"),
        ("/pause_generation", {"mode": "colour"}, "mode"),
        ("/release_memory_occupation", {"tags": ["colour"]}, "tags"),
        ("/weights_checker", {"action": "reset_tensors"}, "action"),
        ("/continue_generation", {"colour": 1}, "colour"),
    ],
)
def test_refusals_name_the_field(path: str, fields: dict[str, Any], words: str) -> None:
    client, controls = client_of(DONE)
    reply = client.post(path, json={**VALID[path], **fields})
    assert reply.status_code == 400 and words in reply.json()["error"]["message"]
    assert not controls.calls


def test_a_flush_waits_as_long_as_it_is_told_to() -> None:
    client, controls = client_of(REFUSED)
    assert client.get("/flush_cache").status_code == 400 and len(controls.calls) == 1
    assert client.post("/flush_cache?timeout=0.25").status_code == 400 and len(controls.calls) > 2
    num_calls = len(controls.calls)
    for text in ("-1", "nan", "601", "x", ""):
        reply = client.get("/flush_cache", params={"timeout": text})
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "timeout", text
    assert len(controls.calls) == num_calls
    client, controls = client_of(DONE)
    assert client.get("/flush_cache?timeout=600").status_code == 200 and len(controls.calls) == 1


def through(client: TestClient) -> httpx.MockTransport:
    def handle(request: httpx.Request) -> httpx.Response:
        reply = client.request(request.method, request.url.path, content=request.content, headers=dict(request.headers))
        return httpx.Response(reply.status_code, content=reply.content)

    return httpx.MockTransport(handle)


def test_the_trainers_client_says_what_it_is_told() -> None:
    client, controls = client_of(DONE)
    control = EngineControl("http://testserver", transport=through(client))
    control.pause_generation("in_place")
    control.update_weights_from_disk("m", weight_version="v", flush_cache=False)
    control.update_weights_from_file("p", is_last=True)
    control.init_weights_update_group("h", 1, 1, 3, "g", "gloo")
    control.update_weights_from_distributed(
        TENSORS["names"], TENSORS["dtypes"], TENSORS["shapes"], "g", load_format="flattened_bucket", weight_version="v"
    )
    control.destroy_weights_update_group("g")
    control.release_memory_occupation(["weights"])
    control.resume_memory_occupation()
    control.flush_cache()
    control.continue_generation()
    control.update_weight_version("w")
    assert control.get_weights_by_name("a") == [[1.0]] and control.checksum_weights() == {"a": "0"}
    tensors = (TENSORS["names"], TENSORS["dtypes"], TENSORS["shapes"], "g", "flattened_bucket")
    assert controls.calls == [
        PauseGeneration("in_place"),
        UpdateWeightsFromDisk("m", weight_version="v", flush_cache=False),
        UpdateWeightsFromTensor("p", is_last=True),
        InitWeightsUpdateGroup("h", 1, 1, 3, "g", "gloo"),
        UpdateWeightsFromDistributed(*tensors, weight_version="v"),
        DestroyWeightsUpdateGroup("g"),
        ReleaseMemoryOccupation(["weights"]),
        ResumeMemoryOccupation(),
        FlushCache(),
        ContinueGeneration(),
        UpdateWeightVersion("w"),
        GetWeightsByName("a"),
        CheckWeights("checksum"),
    ]
    client, _ = client_of(REFUSED)
    with pytest.raises(RuntimeError, match="HTTP 400: weights: a transfer was torn"):
        EngineControl("http://testserver", transport=through(client)).continue_generation()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_an_upload_for_which_there_is_no_room_is_507_with_the_reason(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a part of the file, too, and nothing is left of it."""
    num_calls = 0

    def write(fd: int, data: bytes) -> int:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 2:
            raise OSError(number, os.strerror(number))
        return 1

    monkeypatch.setattr("waybill.engine.weight_sync.memory_file.os.write", write)
    nothing: Any = None
    controls = EngineControls(EngineConfig(model_path=""), nothing, nothing, nothing, nothing, nothing)
    app = FastAPI()
    install_error_handlers(app)
    manager: Any = SimpleNamespace(controls=controls)
    app.include_router(control_router(manager, BodyReader(WorkThreads(), 1000, NoObserver())))
    reply = TestClient(app).post("/update_weights_from_tensor", json={"safetensors": "YWJjZA=="})
    assert reply.status_code == 507 and num_calls == 2
    assert os.strerror(number) in reply.json()["error"]["message"]
    files = [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.islink(f"/proc/self/fd/{fd}")
    ]
    assert not [file for file in files if "waybill-weights" in file]
