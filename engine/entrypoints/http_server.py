"""The HTTP service: native API, OpenAI's, and what a server says of itself, in one FastAPI application."""

from __future__ import annotations

from fastapi import FastAPI, Request
from starlette.responses import Response

from ..chat_template import ChatTemplate
from ..tokenizer_manager import TokenizerManager
from .control import control_router
from .errors import install_error_handlers
from .gate import Gate
from .info import info_router
from .native import native_router
from .openai.protocol import ChatCompletionRequest, CompletionRequest
from .openai.serving_chat import ChatServing
from .openai.serving_completions import CompletionServing
from .service_metrics import ServiceMetrics


def make_app(
    manager: TokenizerManager,
    template: ChatTemplate | None,
    metrics: ServiceMetrics,
    *,
    model_name: str,
    api_key: str | None,
    max_body_bytes: int,
    health_timeout_s: float,
) -> FastAPI:
    """The application over a manager, which may still be starting."""
    app = FastAPI(title="Waybill", docs_url=None, redoc_url=None)
    install_error_handlers(app, metrics)
    app.add_middleware(Gate, api_key=api_key, max_body_bytes=max_body_bytes, not_ready=manager.not_ready)
    app.include_router(native_router(manager))
    app.include_router(control_router(manager))
    app.include_router(info_router(manager, metrics, model_name, health_timeout_s))
    chat = ChatServing(manager, template, model_name)
    completions = CompletionServing(manager, model_name)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatCompletionRequest, http: Request) -> Response:
        return await chat.create(body, http)

    @app.post("/v1/completions")
    async def create_completion(body: CompletionRequest, http: Request) -> Response:
        return await completions.create(body, http)

    return app
