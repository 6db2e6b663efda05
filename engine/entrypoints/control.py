"""Control operations: pauses, weight updates, memory, the prefix cache."""

from __future__ import annotations

import asyncio
import base64
import binascii
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter
from pydantic import AfterValidator, Field, model_validator
from starlette.responses import Response

from ..field_error import FieldError
from ..io_struct import ControlReply, WeightOptions
from ..request_model import Items, Number, RequestModel, check_utf8
from ..tokenizer_manager import TokenizerManager
from .bodies import BodyReader
from .errors import error_body, error_response, json_response

DEFAULT_GROUP = "weight_update_group"
# Fields of the dialect that would change what happens and are not implemented: legal at the value that means "off".
NEUTRAL_FIELDS: dict[str, Any] = {
    "is_async": False,
    "keep_pause": False,
    "recapture_cuda_graph": False,
    "manifest": None,
}
DISK_NEUTRAL_FIELDS = {**NEUTRAL_FIELDS, "load_format": "auto"}
# Fields of the dialect that change nothing in the result.
IGNORED_FIELDS = ("torch_empty_cache", "token_step")


# What fits the messages to the ranks.
Count = Annotated[Number, Field(ge=0, lt=2**31)]
Name = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(check_utf8)]


class ControlInput(RequestModel):
    ignored_fields = IGNORED_FIELDS


class WeightUpdateInput(ControlInput):
    """What all updates have: see `io_struct.WeightOptions`."""

    neutral_fields = NEUTRAL_FIELDS

    flush_cache: bool = True
    abort_all_requests: bool = False
    weight_version: Annotated[Name, Field(max_length=512)] | None = None

    def options(self, *, is_last: bool = False) -> WeightOptions:
        return WeightOptions(self.flush_cache, self.weight_version, is_last)


class UpdateFromDiskInput(WeightUpdateInput):
    neutral_fields = DISK_NEUTRAL_FIELDS

    model_path: Name


class InitGroupInput(ControlInput):
    master_address: Name
    master_port: Number = Field(ge=1, lt=2**16)
    rank_offset: Count
    world_size: Count
    group_name: Name = DEFAULT_GROUP
    backend: Literal["gloo", "nccl"] = "nccl"


class DestroyGroupInput(ControlInput):
    group_name: Name = DEFAULT_GROUP


class UpdateFromDistributedInput(WeightUpdateInput):
    names: Items[Name]
    dtypes: Items[Name]
    shapes: Items[Items[Count]]
    group_name: Name = DEFAULT_GROUP
    load_format: Name | None = None
    is_last: bool = False


class UpdateFromTensorInput(WeightUpdateInput):
    """`path` of a safetensors file on the ranks' host (shared memory, say), or its bytes as base64."""

    path: Name | None = None
    safetensors: str | None = None
    is_last: bool = False
    serialized_named_tensors: Any = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.serialized_named_tensors is not None:
            raise FieldError(
                "serialized_named_tensors: pickled tensors are not taken; send path (a safetensors file) or safetensors "
                "(its bytes, base64)",
                "serialized_named_tensors",
            )
        if (self.path is None) == (self.safetensors is None):
            raise ValueError("path, safetensors: give exactly one of them")
        return self

    def data(self) -> bytes:
        try:
            return base64.b64decode(self.safetensors or "", validate=True)
        except binascii.Error:
            raise FieldError("safetensors: must be base64", "safetensors") from None


class GetWeightsInput(ControlInput):
    name: Name
    truncate_size: Count = 100


class CheckerInput(ControlInput):
    action: Literal["checksum"]


class PauseInput(ControlInput):
    mode: Literal["abort", "retract", "in_place"] = "abort"


class MemoryInput(ControlInput):
    tags: Items[Literal["weights", "kv_cache"]] | None = None


class EmptyInput(ControlInput):
    pass


def weight_response(reply: ControlReply, **more: Any) -> Response:
    """{success, message}; 400 when it was not done, with the error in the form of every refusal beside them."""
    content = {"success": reply.success, "message": reply.message, **more}
    if reply.success:
        return json_response(content)
    return json_response({**content, **error_body(reply.message, 400)}, 400)


def status_response(reply: ControlReply) -> Response:
    if not reply.success:
        return error_response(reply.message, 400)
    return json_response({"status": "ok", "message": reply.message})


def control_router(manager: TokenizerManager, bodies: BodyReader) -> APIRouter:
    """Routes that change the engine."""
    router = APIRouter(route_class=bodies.route_class())
    add_generation_routes(router, manager)
    add_update_routes(router, manager)
    add_inspection_routes(router, manager)
    return router


def add_generation_routes(router: APIRouter, manager: TokenizerManager) -> None:
    """Pauses, the prefix cache, device memory."""
    controls = manager.controls

    @router.get("/flush_cache")
    @router.post("/flush_cache")
    async def flush_cache() -> Response:
        reply = await controls.flush_cache()
        return weight_response(reply) if reply.success else error_response(reply.message, 400)

    @router.post("/pause_generation")
    async def pause_generation(body: PauseInput | None = None) -> Response:
        return status_response(await controls.pause_generation((body or PauseInput()).mode))

    @router.post("/continue_generation")
    async def continue_generation(body: EmptyInput | None = None) -> Response:
        return status_response(await controls.continue_generation())

    @router.post("/release_memory_occupation")
    async def release_memory_occupation(body: MemoryInput | None = None) -> Response:
        return weight_response(await controls.release_memory_occupation((body or MemoryInput()).tags))

    @router.post("/resume_memory_occupation")
    async def resume_memory_occupation(body: MemoryInput | None = None) -> Response:
        return weight_response(await controls.resume_memory_occupation((body or MemoryInput()).tags))


def add_update_routes(router: APIRouter, manager: TokenizerManager) -> None:
    """Weights from disk, from a trainer's group, from tensors on this host."""
    controls = manager.controls

    @router.post("/update_weights_from_disk")
    async def update_weights_from_disk(body: UpdateFromDiskInput) -> Response:
        reply = await controls.update_weights_from_disk(
            body.model_path,
            flush_cache=body.flush_cache,
            weight_version=body.weight_version,
            abort_all_requests=body.abort_all_requests,
        )
        return weight_response(reply)

    @router.post("/init_weights_update_group")
    async def init_weights_update_group(body: InitGroupInput) -> Response:
        return weight_response(await controls.init_weights_update_group(**body.model_dump()))

    @router.post("/destroy_weights_update_group")
    async def destroy_weights_update_group(body: DestroyGroupInput) -> Response:
        return weight_response(await controls.destroy_weights_update_group(body.group_name))

    @router.post("/update_weights_from_distributed")
    async def update_weights_from_distributed(body: UpdateFromDistributedInput) -> Response:
        reply = await controls.update_weights_from_distributed(
            body.names,
            body.dtypes,
            body.shapes,
            group_name=body.group_name,
            options=body.options(is_last=body.is_last),
            load_format=body.load_format,
            abort_all_requests=body.abort_all_requests,
        )
        return weight_response(reply)

    @router.post("/update_weights_from_tensor")
    async def update_weights_from_tensor(body: UpdateFromTensorInput) -> Response:
        options = body.options(is_last=body.is_last)
        if body.path is not None:
            reply = await controls.update_weights_from_file(
                body.path, options, abort_all_requests=body.abort_all_requests
            )
        else:
            reply = await controls.update_weights_from_bytes(
                await asyncio.to_thread(body.data), options, abort_all_requests=body.abort_all_requests
            )
        return weight_response(reply)


def add_inspection_routes(router: APIRouter, manager: TokenizerManager) -> None:
    """What the weights are."""
    controls = manager.controls

    @router.post("/get_weights_by_name")
    async def get_weights_by_name(body: GetWeightsInput) -> Response:
        reply, rows = await controls.get_weights_by_name(body.name, body.truncate_size)
        return json_response(rows) if reply.success else error_response(reply.message, 400)

    @router.post("/weights_checker")
    async def weights_checker(body: CheckerInput) -> Response:
        reply, checksums = await controls.checksum_weights()
        return weight_response(reply, checksums=checksums)
