"""Control operations over HTTP: bodies and routes are made of the declarations in `control/operations.py`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, ClassVar, Self, get_type_hints

import msgspec
from fastapi import APIRouter, Request
from pydantic import create_model, model_validator
from starlette.responses import Response

from ..control.operations import (
    OPERATIONS,
    CheckWeights,
    ContinueGeneration,
    FlushCache,
    GetWeightsByName,
    Operation,
    PauseGeneration,
    ReleaseMemoryOccupation,
    ResumeMemoryOccupation,
)
from ..frontend.engine_controls import EngineControls
from ..frontend.tokenizer_manager import TokenizerManager
from ..ipc.frontend_messages import ControlReply
from ..validation import dialect_fields
from ..validation.field_error import FieldError, shown
from ..validation.request_model import RequestModel
from .bodies import BodyReader
from .errors import error_body, error_response, json_response

MAX_FLUSH_WAIT_S = 600.0
FLUSH_POLL_S = 0.1
# Without a body they mean what they mean with an empty object.
OPTIONAL_BODIES = (PauseGeneration, ContinueGeneration, ReleaseMemoryOccupation, ResumeMemoryOccupation, CheckWeights)


class OperationInput(RequestModel):
    """A body whose fields are those of `kind`."""

    ignored_fields = dialect_fields.CONTROL_IGNORED
    kind: ClassVar[type[Operation]]

    def operation(self) -> Any:
        return self.kind(**dict(self))

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.operation().check()
        return self


def body_model(kind: type[Operation]) -> type[OperationInput]:
    hints = get_type_hints(kind, include_extras=True)
    declared = {field.name: field for field in msgspec.structs.fields(kind)}
    fields: dict[str, Any] = {
        name: (hint, ... if declared[name].required else declared[name].default)
        for name, hint in hints.items()
        if name in declared
    }
    model = create_model(f"{kind.__name__}Input", __base__=OperationInput, **fields)
    model.kind, model.neutral_fields = kind, kind.neutral_fields
    return model


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


def flush_response(reply: ControlReply) -> Response:
    return weight_response(reply) if reply.success else error_response(reply.message, 400)


def patience_of(http: Request) -> float:
    """Seconds that a flush waits for requests to end, as the dialect has it in the query.

    Raises:
        FieldError: it is no such number.
    """
    text = http.query_params.get("timeout", "0")
    try:
        timeout_s = float(text)
    except ValueError:
        timeout_s = -1.0
    # NaN fails the comparison, too.
    if not 0 <= timeout_s <= MAX_FLUSH_WAIT_S:
        raise FieldError(f"timeout={shown(text)}: must lie in 0 .. {MAX_FLUSH_WAIT_S:g} (seconds)", "timeout")
    return timeout_s


def rows_response(reply: ControlReply) -> Response:
    return json_response(msgspec.json.decode(reply.payload)) if reply.success else error_response(reply.message, 400)


def checksums_response(reply: ControlReply) -> Response:
    return weight_response(reply, checksums=msgspec.json.decode(reply.payload) if reply.success else {})


# What is not in the form of `weight_response`.
RESPONSES: dict[type[Operation], Callable[[ControlReply], Response]] = {
    PauseGeneration: status_response,
    ContinueGeneration: status_response,
    GetWeightsByName: rows_response,
    CheckWeights: checksums_response,
}


def control_router(manager: TokenizerManager, bodies: BodyReader) -> APIRouter:
    """Routes that change the engine."""
    router = APIRouter(route_class=bodies.route_class())
    controls = manager.controls

    # It may be a GET, and what a body says is not looked at.
    @router.get("/flush_cache")
    @router.post("/flush_cache")
    async def flush_cache(http: Request) -> Response:
        deadline = time.monotonic() + patience_of(http)
        while True:
            reply = await controls.run(FlushCache())
            if reply.success or time.monotonic() >= deadline or await http.is_disconnected():
                return flush_response(reply)
            await asyncio.sleep(FLUSH_POLL_S)

    for kind in OPERATIONS:
        if kind is not FlushCache:
            name = kind.route().removeprefix("/")
            router.add_api_route(kind.route(), make_endpoint(controls, kind), methods=["POST"], name=name)
    return router


def make_endpoint(controls: EngineControls, kind: type[Operation]) -> Callable[..., Any]:
    model, respond = body_model(kind), RESPONSES.get(kind, weight_response)

    async def endpoint(body: Any) -> Response:
        return respond(await controls.run((body or model()).operation()))

    # FastAPI and `BodyReader` look for the body's model there.
    endpoint.__annotations__["body"] = model
    if kind in OPTIONAL_BODIES:
        endpoint.__annotations__["body"], endpoint.__defaults__ = model | None, (None,)
    return endpoint
