"""The HTTP service: native API, OpenAI's, and what a server says of itself, in one FastAPI application."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, FastAPI, Request
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from ..chat_formats.formats import ChatFormats
from ..frontend.chat_template import ChatTemplate
from ..frontend.tokenizer_manager import TokenizerManager
from .api_keys import ApiKeys
from .bodies import BodyReader
from .control import control_router
from .errors import install_error_handlers
from .http_limits import HttpLimits
from .info import info_router
from .live_page.live_feed import LiveFeed
from .live_page.page_routes import PAGE_PATHS, page_router
from .native import META_HEADER, native_router
from .not_served import not_served_router
from .openai.protocol import ChatCompletionRequest, CompletionRequest
from .openai.serving_chat import ChatServing
from .openai.serving_completions import CompletionServing
from .origin_guard import AllowedHosts, OriginGuard
from .request_guard import RequestGuard
from .service_metrics import ServiceMetrics
from .update_sessions import update_sessions_router
from .vllm.control import vllm_control_router
from .vllm.token_serving import token_router
from .vllm.trl import trl_router


def make_app(
    manager: TokenizerManager,
    template: ChatTemplate | None,
    metrics: ServiceMetrics,
    *,
    model_name: str,
    api_keys: ApiKeys,
    allowed_hosts: AllowedHosts,
    allowed_origins: Sequence[str],
    limits: HttpLimits,
    health_timeout_s: float,
    formats: ChatFormats | None = None,
    live_feed: LiveFeed | None = None,
) -> FastAPI:
    """The application over a manager, which may still be starting; with a page at `/` if it has a feed."""
    # A redirect would lead where the `Host` header says.
    app = FastAPI(title="Waybill", docs_url=None, redoc_url=None, redirect_slashes=False)
    install_error_handlers(app)
    # The last one added is the first to see a request.
    public_paths = () if live_feed is None else PAGE_PATHS
    app.add_middleware(
        RequestGuard, api_keys=api_keys, limits=limits, not_ready=manager.not_ready, public_paths=public_paths
    )
    if allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=allowed_origins,
            allow_methods=["GET", "POST", "PUT"],
            allow_headers=["*"],
            expose_headers=[META_HEADER],
        )
    app.add_middleware(OriginGuard, api_keys=api_keys, allowed_hosts=allowed_hosts, allowed_origins=allowed_origins)
    bodies = BodyReader(manager.work_threads, limits.max_body_values, metrics)
    app.include_router(native_router(manager, bodies, template))
    app.include_router(control_router(manager, bodies))
    app.include_router(info_router(manager, metrics, model_name, health_timeout_s))
    chat = ChatServing(manager, template, model_name, formats)
    app.include_router(openai_router(bodies, chat, CompletionServing(manager, model_name)))
    if live_feed is not None:
        app.include_router(page_router(live_feed))
    app.include_router(update_sessions_router(manager, bodies))
    app.include_router(vllm_control_router(manager, bodies))
    app.include_router(token_router(manager, bodies, model_name))
    app.include_router(trl_router(manager, bodies, template))
    app.include_router(not_served_router())
    return app


def openai_router(bodies: BodyReader, chat: ChatServing, completions: CompletionServing) -> APIRouter:
    """OpenAI's endpoints, and vLLM's of a chat's prompt."""
    openai = APIRouter(route_class=bodies.route_class())

    @openai.post("/v1/chat/completions")
    async def chat_completions(body: ChatCompletionRequest, http: Request) -> Response:
        return await chat.create(body, http)

    @openai.post("/v1/completions")
    async def create_completion(body: CompletionRequest, http: Request) -> Response:
        return await completions.create(body, http)

    @openai.post("/v1/chat/completions/render", include_in_schema=False)
    async def render_chat(body: ChatCompletionRequest, http: Request) -> Response:
        return await chat.render(body, http)

    return openai
