"""Refusals on the way out: one body for all of them, the one that OpenAI's clients read."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ..answer import GenerationError
from ..generate_request import describe
from ..generation_gate import UnavailableError
from ..tokenizer_manager import EngineDeadError, OverloadedError
from .service_metrics import ServiceMetrics

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 1
STATUS_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    410: "GoneError",
    413: "RequestTooLargeError",
    503: "ServiceUnavailableError",
}


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, "application/json")


def printable(message: str) -> str:
    """A message may quote what it refuses, and JSON cannot hold all of that."""
    return message.encode("ascii", "backslashreplace").decode()


def error_body(message: str, status: int) -> dict[str, Any]:
    """`param` is the field that a message begins with, if it does."""
    message = printable(message)
    field = message.split(":", 1)[0].split("=", 1)[0]
    return {
        "error": {
            "message": message,
            "type": STATUS_TYPES.get(status, "InternalServerError"),
            "param": field if field.replace(".", "_").isidentifier() else None,
            "code": status,
        }
    }


def error_response(message: str, status: int) -> Response:
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else None
    return json_response(error_body(message, status), status, headers)


def abort_reason(message: str) -> dict[str, Any]:
    """The finish reason of a stream that was refused."""
    return {"type": "abort", "message": printable(message), "status_code": 400, "err_type": "BadRequestError"}


def install_error_handlers(app: FastAPI, metrics: ServiceMetrics) -> None:
    """Every exception that a handler may raise, as an answer; anything else is a fault of ours and logged as such."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        metrics.on_refusal("refused")
        return error_response(describe(error.errors()), 400)

    @app.exception_handler(ValueError)
    async def refused(_: Request, error: ValueError) -> Response:
        return error_response(str(error), 400)

    @app.exception_handler(OverloadedError)
    async def overloaded(_: Request, error: OverloadedError) -> Response:
        return error_response(str(error), 503)

    @app.exception_handler(UnavailableError)
    async def unavailable(_: Request, error: UnavailableError) -> Response:
        return error_response(str(error), 503)

    @app.exception_handler(EngineDeadError)
    async def dead(_: Request, error: EngineDeadError) -> Response:
        return error_response(str(error), 503)

    @app.exception_handler(GenerationError)
    async def failed(_: Request, error: GenerationError) -> Response:
        # The log of the request says so already.
        return error_response(str(error), 500)

    @app.exception_handler(TimeoutError)
    async def stuck(_: Request, error: TimeoutError) -> Response:
        return error_response("the engine did not answer in time", 503)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return error_response(str(error.detail), error.status_code)
