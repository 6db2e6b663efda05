"""What a server says of itself: health, model, load, metrics."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from ..frontend.engine_connection import EngineDeadError
from ..frontend.tokenizer_manager import TokenizerManager
from .engine_health import EngineHealth
from .errors import error_response, json_response
from .service_metrics import ServiceMetrics

SCRAPE_TIMEOUT_S = 3.0


def info_router(
    manager: TokenizerManager, metrics: ServiceMetrics, model_name: str, health_timeout_s: float
) -> APIRouter:
    """Routes that change nothing."""
    router = APIRouter()
    started = int(time.time())
    engine_health = EngineHealth(manager, health_timeout_s)

    @router.get("/health")
    async def health() -> Response:
        reason = manager.not_ready()
        return Response() if reason is None else error_response(reason, 503)

    @router.get("/health_generate")
    async def health_generate() -> Response:
        reason = await engine_health.problem()
        return Response() if reason is None else error_response(reason, 503)

    @router.get("/get_model_info")
    @router.get("/model_info", include_in_schema=False)
    async def model_info() -> Response:
        config = manager.config
        return json_response(
            {
                "model_path": config.model_path,
                "tokenizer_path": config.tokenizer_path or config.model_path,
                "is_generation": True,
                "weight_version": (await manager.get_state())["weight_version"],
                "model_type": manager.facts["model_type"],
                "context_length": manager.facts["context_length"],
            }
        )

    @router.get("/get_weight_version")
    async def weight_version() -> Response:
        return json_response({"weight_version": (await manager.get_state())["weight_version"]})

    @router.get("/get_server_info")
    @router.get("/server_info", include_in_schema=False)
    async def server_info() -> Response:
        return json_response(server_info_of(manager, await manager.get_state()))

    @router.get("/v1/loads")
    async def loads() -> Response:
        engine = await manager.get_state()
        loads = [
            {
                "dp_rank": dp_rank,
                "num_running_reqs": state["num_running"],
                "num_waiting_reqs": state["num_waiting"],
                "num_used_tokens": (state["num_pages"] - state["num_free_pages"]) * engine["page_size"],
                "max_total_num_tokens": engine["kv_cache_tokens"],
                "token_usage": 1 - state["num_free_pages"] / state["num_pages"],
            }
            for dp_rank, state in enumerate(engine["dp_ranks"])
        ]
        return json_response({"timestamp": time.time(), "dp_rank_count": manager.config.dp_size, "loads": loads})

    @router.get("/v1/models")
    async def models() -> Response:
        model = {
            "id": model_name,
            "object": "model",
            "created": started,
            "owned_by": "waybill",
            "root": manager.config.model_path,
            "max_model_len": manager.facts["context_length"],
        }
        return json_response({"object": "list", "data": [model]})

    @router.get("/metrics")
    async def prometheus() -> Response:
        try:
            ready = manager.not_ready() is None
            state = await asyncio.wait_for(manager.get_state(), SCRAPE_TIMEOUT_S) if ready else None
        except (EngineDeadError, TimeoutError):
            state = None
        return Response(metrics.render(state), media_type=CONTENT_TYPE_LATEST)

    return router


def server_info_of(manager: TokenizerManager, state: dict[str, Any]) -> dict[str, Any]:
    config = manager.config
    options = {name: getattr(config, name) for name in config.__struct_fields__}
    return {**options, **state, "routed_experts_endpoint": manager.queries.claims_address}
