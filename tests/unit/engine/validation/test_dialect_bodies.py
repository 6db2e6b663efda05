"""Bodies as clients of the dialect write them are taken."""

from __future__ import annotations

from typing import Any

import pytest

from waybill.engine.control.operations import (
    CheckWeights,
    InitWeightsUpdateGroup,
    ReleaseMemoryOccupation,
    ResumeMemoryOccupation,
    UpdateWeightsFromDisk,
    UpdateWeightsFromDistributed,
    UpdateWeightsFromTensor,
    UpdateWeightVersion,
)
from waybill.engine.entrypoints.control import body_model
from waybill.engine.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest
from waybill.engine.frontend.generate_request import GenerateReqInput
from waybill.engine.validation.request_model import validate

Body = dict[str, Any]
TENSORS = {"names": ["a"], "dtypes": ["float32"], "shapes": [[1]]}

# sglang, sgl-model-gateway/src/protocols/generate.rs: fields without `skip_serializing_if` are always sent.
ROUTER = {
    **{"model": None, "return_text_in_logprobs": False, "stream": False, "log_metrics": True},
    **{"return_hidden_states": False, "background": False, "no_logs": False, "return_bytes": False},
    **{"return_entropy": False, "input_ids": [1, 2], "sampling_params": {"max_new_tokens": 4, "temperature": 1.0}},
}
# What sglang-router 0.3.2 makes of a small request of OpenAI's.
ROUTER_CHAT = {
    **{"messages": [{"role": "user", "content": "x"}], "model": "m", "logprobs": False, "stream": False},
    **{"no_stop_trim": False, "ignore_eos": False, "continue_final_message": False, "skip_special_tokens": True},
    **{"separate_reasoning": True, "stream_reasoning": True, "return_hidden_states": False},
}
ROUTER_COMPLETION = {
    **{"model": "m", "prompt": "ab", "stream": False, "echo": False, "no_stop_trim": False, "ignore_eos": False},
    **{"skip_special_tokens": True, "return_hidden_states": False},
}
# miles' fork of it adds these.
MILES_ROUTER = {**ROUTER, "return_routed_experts": True, "require_reasoning": False, "return_prompt_token_ids": False}
# slime, slime/rollout/sglang_rollout.py: GenerateState and generate.
SLIME = {
    "sampling_params": {
        **{"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_new_tokens": 64, "stop": None, "stop_token_ids": None},
        **{"skip_special_tokens": False, "no_stop_trim": True, "spaces_between_special_tokens": False},
        "sampling_seed": 7,
    },
    **{"return_logprob": True, "return_routed_experts": True, "input_ids": [1, 2]},
}
# miles, miles/rollout/generate_utils/generate_endpoint_utils.py: compute_request_payload.
MILES = {
    **{"input_ids": [1, 2], "sampling_params": SLIME["sampling_params"], "return_logprob": True},
    **{"return_routed_experts": True, "return_indexer_topk": False, "extra_key": "namespace"},
}
# AReaL, areal/engine/sglang_remote.py: agenerate.
AREAL = {
    **{"input_ids": [1, 2], "image_data": [], "return_logprob": True, "stream": False},
    "sampling_params": {
        **{"top_p": 1.0, "top_k": 100_000_000, "max_new_tokens": 64, "temperature": 1.0},
        **{"stop_token_ids": [2], "frequency_penalty": 0.0},
    },
}
# sglang, lang/backend/runtime_endpoint.py with lang/ir.py (to_srt_kwargs).
RUNTIME_ENDPOINT = {
    "text": "x",
    "sampling_params": {
        **{"skip_special_tokens": True, "spaces_between_special_tokens": True, "max_new_tokens": 128},
        **{"min_new_tokens": 0, "n": 1, "stop": [], "stop_token_ids": [], "stop_regex": [], "temperature": 1.0},
        **{"top_p": 1.0, "top_k": -1, "min_p": 0.0, "frequency_penalty": 0.0, "presence_penalty": 0.0},
        **{"ignore_eos": False, "regex": None, "json_schema": None},
    },
    **{"return_logprob": None, "logprob_start_len": None, "top_logprobs_num": None, "stream": True},
}
# The same file, Runtime.generate.
RUNTIME = {
    **{"text": ["x", "y"], "sampling_params": {"n": 1}, "return_logprob": False, "logprob_start_len": -1},
    **{"top_logprobs_num": 0, "lora_path": [None, None], "session_id": None},
}
# verl, verl/workers/rollout/sglang_rollout/http_server_engine.py: generate sends what is not None.
VERL = {
    **{"input_ids": [1, 2], "sampling_params": {"n": 1, "max_new_tokens": 8, "repetition_penalty": 1.0}},
    **{"return_logprob": True, "image_data": None, "stream": False},
}


@pytest.mark.parametrize(
    "body",
    [ROUTER, MILES_ROUTER, SLIME, MILES, AREAL, RUNTIME_ENDPOINT, RUNTIME, VERL],
    ids=["router", "miles-router", "slime", "miles", "areal", "runtime-endpoint", "runtime", "verl"],
)
def test_bodies_of_clients_are_taken(body: Body) -> None:
    validate(GenerateReqInput, body)


def test_bodies_of_a_router_for_openai_s_api_are_taken() -> None:
    validate(ChatCompletionRequest, ROUTER_CHAT)
    validate(CompletionRequest, ROUTER_COMPLETION)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        # slime and miles, backends/sglang_utils/sglang_engine.py.
        (UpdateWeightsFromDistributed, {**TENSORS, "group_name": "g", "flush_cache": False, "selector": "all"}),
        (ResumeMemoryOccupation, {"tags": ["kv_cache", "cuda_graph"]}),
        (ReleaseMemoryOccupation, {"tags": None}),
        (CheckWeights, {"action": "snapshot", "allow_quant_error": False, "selector": "all"}),
        (CheckWeights, {"action": "compare", "allow_quant_error": False, "selector": "all", "skip_tensor_list": ["r"]}),
        (UpdateWeightVersion, {"new_version": "3"}),
        # AReaL, areal/engine/sglang_remote.py.
        (UpdateWeightsFromDisk, {"model_path": "m", "abort_all_request": True}),
        (UpdateWeightsFromDistributed, {**TENSORS, "group_name": "g", "abort_all_requests": True}),
        (
            InitWeightsUpdateGroup,
            {
                **{"master_address": "h", "master_port": "29500", "rank_offset": 1, "world_size": 3},
                **{"backend": "nccl", "group_name": "g"},
            },
        ),
    ],
)
def test_bodies_of_trainers_are_taken(kind: Any, body: Body) -> None:
    validate(body_model(kind), body)


# verl (http_server_engine.py), slime and miles: buckets of pickled handles.
@pytest.mark.parametrize("load_format", ["flattened_bucket", None])
def test_pickled_buckets_are_refused_for_what_they_are(load_format: str | None) -> None:
    body = {"serialized_named_tensors": ["gASV"], "load_format": load_format, "flush_cache": False, "selector": "all"}
    with pytest.raises(ValueError, match=r"pickled.*safetensors.*update_weights_from_distributed") as refusal:
        validate(body_model(UpdateWeightsFromTensor), body)
    assert str(refusal.value).startswith("serialized_named_tensors: ")
