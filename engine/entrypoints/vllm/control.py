"""vLLM's control endpoints for trainers: pauses, weight updates, memory, the prefix cache."""

from __future__ import annotations

from typing import Annotated, Any, Self

from fastapi import APIRouter, Request
from pydantic import Field, model_validator
from starlette.responses import Response

from ...control.blocked import BlockedKind
from ...control.operations import (
    MEMORY_TAGS,
    ContinueGeneration,
    FlushCache,
    Name,
    PauseGeneration,
    ResumeMemoryOccupation,
)
from ...frontend.tokenizer_manager import TokenizerManager
from ...ipc.frontend_messages import ControlReply
from ...validation import dialect_fields
from ...validation.field_error import FieldError, shown
from ...validation.request_model import Model, PerPrompt, RequestModel, validate
from ..bodies import BodyReader
from ..errors import error_response, json_response
from .weight_transfer import NOT_CHECKPOINT, InitInfo, UpdateInfo, WeightTransfer

# vLLM's modes of a pause, and what they are called here; "wait" is an "in_place" that waits until nothing runs.
PAUSE_MODES = {"abort": "abort", "wait": "in_place", "keep": "in_place"}
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


class Empty(RequestModel):
    """What is said beside the query, and means nothing."""

    ignored_fields = dialect_fields.VLLM_CONTROL_IGNORED


class ResetCacheInput(RequestModel):
    ignored_fields = dialect_fields.VLLM_CONTROL_IGNORED
    neutral_fields = dialect_fields.VLLM_RESET

    reset_running_requests: bool = False


class AbortInput(RequestModel):
    request_ids: PerPrompt[Name] = Field([])


class InitTransferInput(RequestModel):
    init_info: InitInfo


class StartInput(RequestModel):
    is_checkpoint_format: bool = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.is_checkpoint_format:
            raise FieldError(NOT_CHECKPOINT, "is_checkpoint_format")
        return self


class UpdateInput(RequestModel):
    """vLLM's `update_info`, or the checkpoint folder of prime-rl."""

    update_info: UpdateInfo | None = None
    weight_dir: Name | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.update_info is None) == (self.weight_dir is None):
            raise ValueError(
                "update_info, weight_dir: give exactly one of them; a weight_dir that is null is of prime-rl's NCCL "
                "broadcast, which is not supported, set weight_broadcast.type to 'filesystem'"
            )
        return self


class FinishInput(RequestModel):
    weight_version: Annotated[Name, Field(max_length=512)] | None = None


class NcclInput(RequestModel):
    update_info: UpdateInfo


class RpcInput(RequestModel):
    """A method of a worker's. There are those that SkyRL calls for an update."""

    method: Name
    kwargs: dict[str, Any] = Field({})
    neutral_fields = dialect_fields.VLLM_RPC


def check_query(http: Request, *known: str) -> None:
    """A name that is misspelt would leave the default, which may end requests."""
    for name in http.query_params:
        if name not in known:
            raise FieldError(
                f"{shown(name)}: is no parameter of this request, which has {', '.join(known)}", shown(name)
            )


def query_flag(http: Request, name: str, default: bool) -> bool:
    text = http.query_params.get(name)
    if text is None:
        return default
    if text.lower() not in BOOLEANS:
        raise FieldError(f"{name}={shown(text)}: must be true or false", name)
    return BOOLEANS[text.lower()]


def query_choice(http: Request, name: str, choices: tuple[str, ...], default: str) -> str:
    text = http.query_params.get(name, default)
    if text not in choices:
        raise FieldError(f"{name}={shown(text)}: must be one of {', '.join(choices)}", name)
    return text


def query_tags(http: Request) -> list[str]:
    tags = http.query_params.getlist("tags")
    for tag in tags:
        if tag not in MEMORY_TAGS:
            raise FieldError(f"tags={shown(tag)}: must be one of {', '.join(MEMORY_TAGS)}", "tags")
    return tags


def refused(reply: ControlReply) -> Response:
    return error_response(reply.message, 400)


def vllm_control_router(manager: TokenizerManager, bodies: BodyReader) -> APIRouter:
    router = APIRouter(route_class=bodies.route_class(), include_in_schema=False)
    add_pause_routes(router, manager)
    add_weight_routes(router, manager)
    add_memory_routes(router, manager)
    return router


def add_pause_routes(router: APIRouter, manager: TokenizerManager) -> None:
    controls = manager.controls

    @router.post("/pause")
    async def pause(http: Request, body: Empty | None = None) -> Response:
        check_query(http, "mode", "clear_cache", "wait_for_inflight_requests")
        mode = query_choice(http, "mode", tuple(PAUSE_MODES), "abort")
        if query_flag(http, "wait_for_inflight_requests", False):
            mode = "wait"
        clears = query_flag(http, "clear_cache", True) and mode != "keep"
        if mode == "wait":
            reply = await controls.pause_when_idle()
        else:
            reply = await controls.run(PauseGeneration(PAUSE_MODES[mode]))
        if reply.success and clears:
            reply = await controls.run(FlushCache())
        return json_response({"status": "paused"}) if reply.success else refused(reply)

    @router.post("/resume")
    async def resume(body: Empty | None = None) -> Response:
        reply = await controls.run(ContinueGeneration())
        return json_response({"status": "resumed"}) if reply.success else refused(reply)

    @router.get("/is_paused")
    async def is_paused() -> Response:
        return json_response({"is_paused": manager.is_paused or is_released(manager)})

    @router.post("/abort_requests")
    async def abort_requests(body: AbortInput) -> Response:
        aborted = await manager.abort_exactly(body.request_ids or None)
        return json_response({"status": "aborted", "aborted": aborted})

    @router.post("/reset_prefix_cache")
    @router.post("/reset_prefix_cache/")
    async def reset_prefix_cache(http: Request, body: ResetCacheInput | None = None) -> Response:
        check_query(http, "reset_running_requests", "reset_external")
        if query_flag(http, "reset_external", False):
            raise FieldError("reset_external: must be false, there is no cache beside the engine's", "reset_external")
        resets_running = query_flag(http, "reset_running_requests", body is not None and body.reset_running_requests)
        was_paused = manager.is_paused
        try:
            if resets_running:
                # What runs gives up its pages, and computes them again.
                await controls.run(PauseGeneration("retract"))
            reply = await controls.run(FlushCache())
        finally:
            if resets_running and not was_paused:
                await controls.run(ContinueGeneration())
        return json_response({"success": True}) if reply.success else refused(reply)


def add_weight_routes(router: APIRouter, manager: TokenizerManager) -> None:
    transfer = WeightTransfer(manager)
    config = manager.config

    @router.get("/get_world_size")
    @router.get("/get_world_size/")
    async def world_size(http: Request) -> Response:
        num_dp = config.dp_size if query_flag(http, "include_dp", True) else 1
        return json_response({"world_size": config.tp_size * num_dp})

    @router.get("/weight_info")
    async def weight_info() -> Response:
        return json_response({"weight_version": (await manager.get_state())["weight_version"]})

    @router.post("/init_weight_transfer_engine")
    async def init_transfer(body: InitTransferInput) -> Response:
        reply = await transfer.join(body.init_info)
        return json_response({"message": "Weight transfer initialized"}) if reply.success else refused(reply)

    @router.post("/start_weight_update")
    async def start(body: StartInput | None = None) -> Response:
        return json_response({"message": "Weight update started"})

    @router.post("/update_weights")
    async def update(body: UpdateInput) -> Response:
        if body.update_info is not None:
            reply = await transfer.receive(body.update_info)
        else:
            assert body.weight_dir is not None
            reply = await transfer.load(body.weight_dir)
        return json_response({"message": "Weights updated", "status": "ok"}) if reply.success else refused(reply)

    @router.post("/finish_weight_update")
    async def finish(body: FinishInput | None = None) -> Response:
        problem = await transfer.finish(None if body is None else body.weight_version)
        if problem is not None:
            return error_response(problem, 400)
        return json_response({"message": "Weight update finished"})

    @router.post("/collective_rpc")
    async def collective_rpc(body: RpcInput) -> Response:
        problem = await call_method(transfer, body)
        if problem is not None:
            return error_response(problem, 400)
        return json_response({"results": [None] * (config.tp_size * config.dp_size)})


async def call_method(transfer: WeightTransfer, body: RpcInput) -> str | None:
    """Why it was not done; None if it was.

    Raises:
        ValueError: there is no such method, or its arguments are wrong.
    """
    match body.method:
        case "skyrl_start_weight_update":
            kwargs_as(StartInput, body)
            return None
        case "update_weights_nccl":
            reply = await transfer.receive(kwargs_as(NcclInput, body).update_info)
            return None if reply.success else reply.message
        case "skyrl_finish_weight_update":
            return await transfer.finish(kwargs_as(FinishInput, body).weight_version)
    raise FieldError(
        f"method={shown(body.method)}: must be skyrl_start_weight_update, update_weights_nccl or "
        "skyrl_finish_weight_update; workers run no methods of a caller's: use /update_weights, or /sleep and /wake_up",
        "method",
    )


def kwargs_as(model: type[Model], body: RpcInput) -> Model:
    try:
        return validate(model, body.kwargs)
    except FieldError as error:
        raise error.inside(["kwargs"]) from None


def add_memory_routes(router: APIRouter, manager: TokenizerManager) -> None:
    controls = manager.controls

    @router.post("/sleep")
    async def sleep(http: Request, body: Empty | None = None) -> Response:
        check_query(http, "level", "mode", "tags")
        level = query_choice(http, "level", ("0", "1", "2"), "1")
        mode = query_choice(http, "mode", tuple(PAUSE_MODES), "abort")
        tags = query_tags(http)
        if level == "0" or (level == "1" and tags != ["kv_cache"]):
            raise FieldError(
                f"level={level}: must be 2, the weights come again with an update; or 1 with tags=kv_cache, they stay "
                "where they are. They are not kept in host memory; /pause is level 0",
                "level",
            )
        if mode == "keep":
            raise FieldError("mode='keep': memory is released only when nothing runs; must be abort or wait", "mode")
        reply = await controls.release_memory(tags or None, aborts=mode == "abort")
        return Response() if reply.success else refused(reply)

    @router.post("/wake_up")
    async def wake_up(http: Request, body: Empty | None = None) -> Response:
        """A pause, if there is one, ends with the last of the memory."""
        check_query(http, "tags")
        reply = await controls.run(ResumeMemoryOccupation(query_tags(http) or None))
        if not reply.success:
            return refused(reply)
        if not is_released(manager):
            await controls.run(ContinueGeneration())
        return Response()

    @router.get("/is_sleeping")
    async def is_sleeping() -> Response:
        return json_response({"is_sleeping": is_released(manager)})


def is_released(manager: TokenizerManager) -> bool:
    return manager.blocked is not None and manager.blocked.kind is BlockedKind.RELEASED
