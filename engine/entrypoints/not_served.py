"""Endpoints of other servers that are known and not served: 501, with what to use in their place."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from .errors import error_response

METHODS = ["GET", "POST", "PUT", "DELETE"]

SCORES = "this server only generates; /generate with return_logprob and logprob_start_len scores a prompt"
ADAPTERS = "adapters are not supported; send merged weights with /update_weights_from_distributed or from_disk"
TRANSFER = "ranks hold no address to write weights to; use /init_weights_update_group or /update_weights_from_disk"
PROFILE = "the server takes no profile of itself; /metrics has its times, bench/ the programs that profile an engine"
ROUTES = "every request that asks with return_routed_experts has its routes in its answer"
SESSION = "sessions hold no state; /generate takes session_id, and the prefix cache keeps what turns share"
CHAT = "use /v1/chat/completions"
CACHE = "there is no second tier of the prefix cache; /flush_cache empties it"
LOGGING = "set at the start, with --log-level"
TRAINER = "use /init_weights_update_group and /update_weights_from_distributed, of which the trainer is rank 0"
IMAGES = "what is kept of images is found by their content; start the encoder anew for other weights of its tower"
DISAGGREGATION = "the side is set at the start, with --disaggregation"

# Path -> what to use. Those of sglang 0.5.23, and of its forks for slime and miles.
SGLANG: Mapping[str, str] = {
    **dict.fromkeys(("/encode", "/classify", "/v1/classify", "/v1/embeddings", "/v1/score", "/v1/rerank"), SCORES),
    **dict.fromkeys(("/v1/decisions", "/v1/systemone"), SCORES),
    **dict.fromkeys(("/load_lora_adapter", "/unload_lora_adapter", "/load_lora_adapter_from_tensors"), ADAPTERS),
    "/load_lora_adapter_from_distributed": ADAPTERS,
    "/update_weights_from_ipc": "handles of CUDA memory are pickled there; use /update_weights_from_tensor with path or "
    "safetensors, or /update_weights_from_distributed",
    "/pull_weights": "use /update_weights_from_disk with a folder that all ranks can open",
    **dict.fromkeys(
        (
            "/init_weights_send_group_for_remote_instance",
            "/send_weights_to_remote_instance",
            "/get_remote_instance_transfer_engine_info",
            "/remote_instance_transfer_engine_info",
        ),
        TRANSFER,
    ),
    "/parallelism_config": f"/server_info has tp_size, dp_size and ep_size; {TRANSFER}",
    **dict.fromkeys(("/start_profile", "/stop_profile", "/set_trace_level"), PROFILE),
    **dict.fromkeys(
        (
            "/start_expert_distribution_record",
            "/stop_expert_distribution_record",
            "/dump_expert_distribution_record",
        ),
        ROUTES,
    ),
    **dict.fromkeys(("/open_session", "/close_session"), SESSION),
    **dict.fromkeys(("/v1/responses", "/v1/responses/{rest:path}", "/v1/messages", "/v1/messages/count_tokens"), CHAT),
    **dict.fromkeys(("/api/chat", "/api/generate", "/invocations", "/vertex_generate"), f"{CHAT} or /generate"),
    **dict.fromkeys(("/api/tags", "/api/show"), "use /v1/models"),
    "/v1/audio/transcriptions": "this server takes text and token ids alone",
    **dict.fromkeys(
        ("/hicache/storage-backend", "/hicache/storage-backend/clear", "/get_hicache_l3_cache_layout"), CACHE
    ),
    **dict.fromkeys(("/add_external_corpus", "/remove_external_corpus", "/list_external_corpora"), CACHE),
    "/configure_logging": LOGGING,
    "/set_internal_state": "options are set at the start; /server_info has them",
    "/freeze_gc": "the ranks freeze what is there once they have started",
    "/slow_down": "use /pause_generation and /continue_generation",
    "/pd_role_switch": DISAGGREGATION,
    "/parse_function_call": "tools are not supported; parse the text of the answer",
    "/separate_reasoning": "reasoning is not parsed; the text of the answer has it",
}
# `trl vllm-serve`; its client writes a slash at the end.
TRL: Mapping[str, str] = {
    "/get_sequence_logprobs": "use /inference/v1/generate with prompt_logprobs",
    "/init_communicator": TRAINER,
    "/update_named_param": TRAINER,
    "/batch_update_named_params": TRAINER,
    "/close_communicator": "use /destroy_weights_update_group",
}
# vLLM 0.22, prime-rl's and SkyRL's servers.
VLLM: Mapping[str, str] = {
    "/start_draft_weight_update": "there is no draft model; use /start_weight_update",
    "/weight_checker": "use /weights_checker",
    **dict.fromkeys(("/reset_mm_cache", "/reset_encoder_cache"), IMAGES),
    "/init_broadcaster": "its NCCL communicator is made from what a trainer pickles; let prime-rl write the weights to "
    "files (weight_broadcast.type 'filesystem'), which /update_weights takes with weight_dir",
    "/fetch_weights": "use /update_weights_from_disk",
    "/finish_session": "sessions hold no state",
    "/scale_elastic_ep": "the number of ranks is set at the start",
    "/v1/completions/render": "use /tokenize",
    **dict.fromkeys(("/v1/chat/completions/derender", "/v1/completions/derender"), "use /detokenize"),
    **dict.fromkeys(("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/skyrl/v1/load_lora_adapter"), ADAPTERS),
}
NOT_SERVED: Mapping[str, str] = {
    **SGLANG,
    **TRL,
    **{f"{path}/": hint for path, hint in TRL.items()},
    **VLLM,
}


def not_served_router() -> APIRouter:
    router = APIRouter(include_in_schema=False)
    for path, hint in NOT_SERVED.items():
        router.add_api_route(path, refusal(f"{path.partition('{')[0]} is not served: {hint}"), methods=METHODS)
    return router


def refusal(message: str) -> Callable[[], Coroutine[Any, Any, Response]]:
    async def endpoint() -> Response:
        return error_response(message, 501)

    return endpoint
