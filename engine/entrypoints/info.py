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
from ..validation.field_error import shown
from .engine_health import EngineHealth
from .errors import error_response, json_response
from .service_metrics import ServiceMetrics

SCRAPE_TIMEOUT_S = 3.0
SIDE_HEADER = "X-Disaggregation"
ENCODER_HEADER = "X-Encoder"
# Options of the dialect's server which trainers compare with what they would have started (slime and miles: external
# engines). There is one program on all nodes, on devices that nobody else chooses, without stages of a pipeline; memory can
# be given back in any case, while `enable_memory_saver` is of servers that share their devices with a trainer.
DIALECT_OPTIONS = {
    **{"enable_memory_saver": False, "enable_metrics": True, "pp_size": 1, "nnodes": 1, "node_rank": 0},
    **{"base_gpu_id": 0, "gpu_id_step": 1, "encoder_only": False},
    # Of vLLM: TRL's client opens a transfer of vLLM's own only where there is one, and says so where there is none.
    "vllm_config": {"weight_transfer_config": None},
}


def info_router(
    manager: TokenizerManager, metrics: ServiceMetrics, model_name: str, health_timeout_s: float
) -> APIRouter:
    """Routes that change nothing."""
    router = APIRouter()
    started = int(time.time())
    add_health_routes(router, manager, EngineHealth(manager, health_timeout_s))

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

    @router.get("/get_load")
    async def get_load() -> Response:
        return json_response(old_loads_of(await manager.get_state()))

    @router.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [model_card(manager, model_name, started)]})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != model_name:
            return error_response(f"model: there is no {shown(name)}, the model is {model_name!r}", 404)
        return json_response(model_card(manager, model_name, started))

    @router.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.render(await state_for_scrape(manager)), media_type=CONTENT_TYPE_LATEST)

    return router


def add_health_routes(router: APIRouter, manager: TokenizerManager, engine_health: EngineHealth) -> None:
    """Routes that say by their status how the engine is, and by a header which side of two it is."""

    # Load balancers ask the head alone, and SageMaker's asks for a ping.
    # TRL's client writes a slash at the end.
    @router.get("/health/", include_in_schema=False)
    @router.head("/health", include_in_schema=False)
    @router.get("/health")
    @router.get("/ping", include_in_schema=False)
    async def health() -> Response:
        reason = manager.not_ready()
        if reason is not None:
            return error_response(reason, 503)
        headers = {SIDE_HEADER: manager.config.disaggregation}
        if manager.images is not None:
            # Prompts without images go on without it.
            headers[ENCODER_HEADER] = "up" if manager.images.problem is None else "down"
        return Response(headers=headers)

    @router.get("/ready")
    async def ready() -> Response:
        reason = manager.not_ready() or manager.why_requests_wait()
        return Response() if reason is None else error_response(reason, 503)

    @router.get("/health_generate")
    async def health_generate() -> Response:
        reason = await engine_health.problem()
        return Response() if reason is None else error_response(reason, 503)


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
    world_size = config.tp_size * config.dp_size
    return {
        **options,
        **DIALECT_OPTIONS,
        "encoder_problem": None if manager.images is None else manager.images.problem,
        "disaggregation_mode": "null" if config.disaggregation == "none" else config.disaggregation,
        "disaggregation_transports": transports_of(state),
        **state,
        "num_gpus": world_size,
        "ep_size": world_size if config.moe_split == "ep" else 1,
        "max_total_num_tokens": state["kv_cache_tokens"],
        "internal_states": state["dp_ranks"],
        "routed_experts_endpoint": manager.queries.claims_address,
    }


def transports_of(state: dict[str, Any]) -> list[str]:
    """How pages have come from another engine, or gone to one."""
    carried = {name: state[f"transferred_{name}_bytes"] for name in ("shared", "nixl")}
    carried["tcp"] = state["transferred_bytes"] - sum(carried.values())
    return [name for name, num_bytes in carried.items() if num_bytes]


def loads_of(state: dict[str, Any]) -> list[dict[str, Any]]:
    """Requests and tokens of every dp rank."""
    return [
        {
            "dp_rank": dp_rank,
            "num_running_reqs": rank["num_running"],
            "num_waiting_reqs": rank["num_waiting"],
            "num_total_reqs": rank["num_running"] + rank["num_waiting"],
            "num_used_tokens": (rank["num_pages"] - rank["num_free_pages"]) * state["page_size"],
            "max_total_num_tokens": state["kv_cache_tokens"],
            "token_usage": 1 - rank["num_free_pages"] / rank["num_pages"],
        }
        for dp_rank, rank in enumerate(state["dp_ranks"])
    ]


def old_loads_of(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The same in the form of `/get_load`, which routers ask for."""
    return [
        {
            "dp_rank": load["dp_rank"],
            "num_reqs": load["num_total_reqs"],
            "num_waiting_reqs": load["num_waiting_reqs"],
            "num_tokens": load["num_used_tokens"],
        }
        for load in loads_of(state)
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
