"""Refusals on the way out: one body for all of them, the one that OpenAI's clients read.

The text of a 400 is that of a `ValueError`, most often a `FieldError`: `validation/request_model.py` raises it for a field
of the body, `frontend/request_limits.py` for a prompt that this engine cannot take. Nothing is worded here.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ..frontend.admission import OverloadedError
from ..frontend.answer import GenerationError
from ..frontend.engine_connection import EngineDeadError
from ..frontend.engine_controls import StorageError
from ..frontend.generation_gate import UnavailableError
from ..validation.field_error import FieldError
from .json_log import FIELDS

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 1
# Under which a request's scope carries its rid, for the log.
RID_KEY = "waybill.rid"
# Names of statuses in error bodies. 501 is that of endpoints of a dialect that are refused, with what to use instead.
STATUS_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    410: "GoneError",
    413: "RequestTooLargeError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
    507: "InsufficientStorageError",
}
# Of exceptions whose message is the answer. That of a `GenerationError` is in the log of the request, too.
STATUSES: dict[type[Exception], int] = {
    OverloadedError: 503,
    UnavailableError: 503,
    EngineDeadError: 503,
    GenerationError: 500,
    StorageError: 507,
}


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, "application/json")


def printable(message: str) -> str:
    """A message may quote what it refuses, and JSON cannot hold all of that."""
    return message.encode("ascii", "backslashreplace").decode()


def error_body(refusal: str | Exception, status: int) -> dict[str, Any]:
    """`param` is the field that is wrong: the one that a `FieldError` has, or that a message begins with, if it does.
    Failures of the server (5xx) are no field's fault, whatever part of it their message begins with."""
    message = printable(str(refusal))
    if isinstance(refusal, FieldError):
        field = refusal.field
    else:
        field = message.split(":", 1)[0].split("=", 1)[0] if status < 500 else ""
    return {
        "error": {
            "message": message,
            "type": STATUS_TYPES.get(status, "InternalServerError"),
            "param": field if field.replace(".", "_").isidentifier() else None,
            "code": status,
        }
    }


def error_response(
    refusal: str | Exception, status: int, *, close: bool = False, headers: Mapping[str, str] | None = None
) -> Response:
    """With `close` the connection ends behind it."""
    more = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else {}
    if close:
        more["Connection"] = "close"
    return json_response(error_body(refusal, status), status, {**more, **(headers or {})})


def abort_reason(message: str) -> dict[str, Any]:
    """The finish reason of a stream that was refused."""
    return {"type": "abort", "message": printable(message), "status_code": 400, "err_type": "BadRequestError"}


def answers_with(status: int) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def answer(_: Request, error: Exception) -> Response:
        return error_response(str(error), status)

    return answer


def install_error_handlers(app: FastAPI) -> None:
    """Every exception that a handler may raise, as an answer; anything else is a fault of ours and logged as such."""

    @app.exception_handler(ValueError)
    async def refused(_: Request, error: ValueError) -> Response:
        return error_response(error, 400)

    for kind, status in STATUSES.items():
        app.add_exception_handler(kind, answers_with(status))

    @app.exception_handler(TimeoutError)
    async def stuck(_: Request, error: TimeoutError) -> Response:
        return error_response("the engine did not answer in time", 503)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return error_response(str(error.detail), error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def fault(http: Request, error: Exception) -> Response:
        # The traceback comes from uvicorn, to which the exception goes on.
        fields = {"method": http.method, "path": http.scope["path"], "rid": http.scope.get(RID_KEY)}
        logger.error("a fault of the server: %s", type(error).__name__, extra={FIELDS: fields})
        return error_response("an unexpected error in the server; its log says more", 500, close=True)
