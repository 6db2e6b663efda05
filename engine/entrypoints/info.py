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
        return json_response(model_info_of(manager, await manager.get_state()))

    @router.get("/get_weight_version")
    async def weight_version() -> Response:
        return json_response({"weight_version": (await manager.get_state())["weight_version"]})

    @router.get("/get_server_info")
    @router.get("/server_info", include_in_schema=False)
    async def server_info() -> Response:
        return json_response(server_info_of(manager, await manager.get_state()))

    @router.get("/v1/loads")
    async def loads() -> Response:
        loads = loads_of(await manager.get_state())
        return json_response({"timestamp": time.time(), "dp_rank_count": manager.config.dp_size, "loads": loads})

    @router.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [model_card(manager, model_name, started)]})

    @router.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.render(await state_for_scrape(manager)), media_type=CONTENT_TYPE_LATEST)

    return router


async def state_for_scrape(manager: TokenizerManager) -> dict[str, Any] | None:
    """None where the engine does not tell: what the frontend counts can be scraped all the same."""
    try:
        ready = manager.not_ready() is None
        return await asyncio.wait_for(manager.get_state(), SCRAPE_TIMEOUT_S) if ready else None
    except (EngineDeadError, TimeoutError):
        return None


def model_info_of(manager: TokenizerManager, state: dict[str, Any]) -> dict[str, Any]:
    config = manager.config
    return {
        "model_path": config.model_path,
        "tokenizer_path": config.tokenizer_path or config.model_path,
        "is_generation": True,
        "weight_version": state["weight_version"],
        "model_type": manager.facts["model_type"],
        "context_length": manager.facts["context_length"],
    }


def server_info_of(manager: TokenizerManager, state: dict[str, Any]) -> dict[str, Any]:
    config = manager.config
    options = {name: getattr(config, name) for name in config.__struct_fields__}
    return {**options, **state, "routed_experts_endpoint": manager.queries.claims_address}


def loads_of(state: dict[str, Any]) -> list[dict[str, Any]]:
    """Requests and tokens of every dp rank."""
    return [
        {
            "dp_rank": dp_rank,
            "num_running_reqs": rank["num_running"],
            "num_waiting_reqs": rank["num_waiting"],
            "num_used_tokens": (rank["num_pages"] - rank["num_free_pages"]) * state["page_size"],
            "max_total_num_tokens": state["kv_cache_tokens"],
            "token_usage": 1 - rank["num_free_pages"] / rank["num_pages"],
        }
        for dp_rank, rank in enumerate(state["dp_ranks"])
    ]


def model_card(manager: TokenizerManager, model_name: str, created: int) -> dict[str, Any]:
    """As OpenAI's API lists a model."""
    return {
        "id": model_name,
        "object": "model",
        "created": created,
        "owned_by": "waybill",
        "root": manager.config.model_path,
        "max_model_len": manager.facts["context_length"],
    }
