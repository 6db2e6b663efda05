"""Every field of the dialect's requests is known: declared by a model, ignored, or in the table of those that are refused
unless they ask for nothing."""

from __future__ import annotations

from typing import Any

import pytest

from waybill.engine.control.operations import (
    CheckWeights,
    ContinueGeneration,
    DestroyWeightsUpdateGroup,
    GetWeightsByName,
    InitWeightsUpdateGroup,
    PauseGeneration,
    ReleaseMemoryOccupation,
    ResumeMemoryOccupation,
    UpdateWeightsFromDisk,
    UpdateWeightsFromDistributed,
    UpdateWeightsFromTensor,
    UpdateWeightVersion,
)
from waybill.engine.entrypoints.control import body_model
from waybill.engine.entrypoints.native import AbortRequestInput, DetokenizeInput, TokenizeInput
from waybill.engine.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest, StreamOptions
from waybill.engine.entrypoints.vllm.token_protocol import TokenRequest, VllmSamplingParams
from waybill.engine.entrypoints.vllm.trl import TrlChatRequest, TrlGenerateRequest
from waybill.engine.frontend.generate_request import GenerateReqInput
from waybill.engine.frontend.sampling_params import SamplingParamsInput
from waybill.engine.validation import dialect_fields
from waybill.engine.validation.dialect_fields import is_neutral
from waybill.engine.validation.request_model import RequestModel, validate

Defaults = dict[str, Any]


def nulls(names: str) -> Defaults:
    return dict.fromkeys(names.split())


def falses(names: str) -> Defaults:
    return dict.fromkeys(names.split(), False)


# Fields and defaults of sglang 0.5.23: python/sglang/srt/managers/io_struct.py (GenerateReqInput and the control
# requests), srt/sampling/sampling_params.py, srt/entrypoints/openai/protocol.py.
GENERATE = {
    **nulls(
        "rid session_id text input_ids input_embeds image_data video_data audio_data mm_hashes mm_content_hashes "
        "video_config sampling_params watermark return_logprob logprob_start_len top_logprobs_num token_ids_logprob "
        "return_sampling_mask sampling_logprobs_mode modalities session_params lora_path lora_id custom_logit_processor "
        "positional_embed_overrides bootstrap_host bootstrap_port bootstrap_room bootstrap_pair_key decode_tp_size "
        "routed_dp_rank data_parallel_rank disagg_prefill_dp_rank routing_key conversation_id http_worker_ipc "
        "max_thinking_tokens priority extra_key custom_labels external_trace_header received_time "
        "need_wait_for_mm_inputs num_items_assigned encoder_urls max_dynamic_patch min_dynamic_patch "
        "image_max_dynamic_patch video_max_dynamic_patch images_config mm_processor_kwargs "
        "multi_item_delimiter_indices token_indices_to_pool cache_salt kv_hints"
    ),
    **falses(
        "use_audio_in_video return_text_in_logprobs return_flat_raw_top_logprobs return_flat_raw_output_top_logprobs "
        "return_flat_raw_top_logprobs_b64 stream return_hidden_states return_routed_experts return_indexer_topk "
        "background require_reasoning no_logs return_bytes return_entropy return_prompt_token_ids"
    ),
    "log_metrics": True,
    "routed_experts_start_len": 0,
}
SAMPLING = {
    **nulls(
        "stop stop_token_ids stop_regex beam_width json_schema regex ebnf structural_tag stream_interval logit_bias "
        "sampling_seed custom_params watermark stop_strs stop_regex_strs"
    ),
    **falses("ignore_eos no_stop_trim is_normalized ebnf_full_assistant"),
    **{"max_new_tokens": 128, "temperature": 1.0, "top_p": 1.0, "top_k": 1 << 30, "min_p": 0.0, "n": 1},
    **{"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "min_new_tokens": 0},
    **{"skip_special_tokens": True, "spaces_between_special_tokens": True},
    **{"stop_str_max_len": 0, "stop_regex_max_len": 0},
}
OPENAI = {
    **nulls(
        "bootstrap_host bootstrap_port bootstrap_room routed_dp_rank disagg_prefill_dp_rank logit_bias seed stop "
        "stream_options user regex ebnf stop_token_ids stop_regex lora_path session_id session_params response_format "
        "custom_params custom_logit_processor watermark images_config mm_processor_kwargs data_parallel_rank rid "
        "extra_key cache_salt priority"
    ),
    **falses(
        "stream return_hidden_states return_routed_experts return_cached_tokens_details return_spec_tokens_details "
        "return_token_ids no_stop_trim ignore_eos"
    ),
    **{"model": "default", "n": 1, "frequency_penalty": 0.0, "presence_penalty": 0.0, "min_tokens": 0},
    **{"routed_experts_start_len": 0, "skip_special_tokens": True},
}
COMPLETION = {
    **OPENAI,
    **nulls("best_of logprobs suffix json_schema custom_labels"),
    **falses("echo"),
    **{"max_tokens": 16, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
}
CHAT = {
    **OPENAI,
    **nulls(
        "top_logprobs max_tokens max_completion_tokens temperature top_p tools sampling_logprobs_mode reasoning_effort "
        "thinking task top_k min_p repetition_penalty chat_template_kwargs max_dynamic_patch min_dynamic_patch "
        "video_config input_ids"
    ),
    **falses(
        "logprobs return_prompt_token_ids return_meta_info return_input_ids_in_sglext return_output_ids_in_sglext "
        "return_sampling_mask return_flat_raw_output_top_logprobs continue_final_message use_audio_in_video"
    ),
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "return_flat_raw_top_logprobs_b64": True,
    "separate_reasoning": True,
    "stream_reasoning": True,
}
# vLLM 0.22: `SamplingParams`, and what its requests have beside the fields of OpenAI's.
VLLM_SAMPLING = {
    **nulls(
        "seed stop stop_token_ids logprobs prompt_logprobs prompt_logprob_token_ids prompt_logprob_start logprob_token_ids "
        "stream_interval logit_bias allowed_token_ids extra_args bad_words skip_reading_prefix_cache "
        "thinking_token_budget repetition_detection trace_decode_token_ids structured_outputs watermarking"
    ),
    **falses("ignore_eos flat_logprobs include_stop_str_in_output skip_clone"),
    **{"n": 1, "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "temperature": 1.0},
    **{"top_p": 1.0, "top_k": 0, "min_p": 0.0, "max_tokens": 16, "min_tokens": 0, "detokenize": True, "output_kind": 2},
    **{"skip_special_tokens": True, "spaces_between_special_tokens": True, "routed_experts_prompt_start": 0},
    "output_text_buffer_length": 0,
}
VLLM_OPENAI = {
    **nulls(
        "frequency_penalty logit_bias presence_penalty seed stream_options temperature top_p user top_k min_p "
        "repetition_penalty watermarking truncate_prompt_tokens truncation_side allowed_token_ids prompt_logprobs "
        "logprob_token_ids response_format structured_outputs session_id return_tokens_as_token_ids return_token_ids "
        "cache_salt kv_transfer_params ec_transfer_params vllm_xargs repetition_detection thinking_token_budget "
        "stream_interval"
    ),
    **falses("stream use_beam_search include_stop_str_in_output ignore_eos return_token_offsets"),
    **{
        "stop": [],
        "stop_token_ids": [],
        "bad_words": [],
        "length_penalty": 1.0,
        "min_tokens": 0,
        "priority": 0,
        "n": 1,
    },
    **{"skip_special_tokens": True, "spaces_between_special_tokens": True, "request_id": "r", "return_mm_kwargs": True},
    **{"model": None, "routed_experts_prompt_start": 0},
}
VLLM_COMPLETION = {
    **VLLM_OPENAI,
    **nulls("logprobs suffix prompt_embeds"),
    **{"echo": False, "max_tokens": 16, "add_special_tokens": True},
}
VLLM_CHAT = {
    **VLLM_OPENAI,
    **nulls(
        "max_tokens max_completion_tokens tools reasoning_effort documents chat_template chat_template_kwargs "
        "media_io_kwargs mm_processor_kwargs return_prompt_text"
    ),
    **falses("logprobs echo continue_final_message add_special_tokens"),
    **{"top_logprobs": 0, "tool_choice": "none", "include_reasoning": True, "parallel_tool_calls": True},
    "add_generation_prompt": True,
}
VLLM_TOKENS = {
    **nulls(
        "token_offsets features content_parts model reasoning_ended reasoning_parser_kwargs return_token_ids "
        "stream_options cache_salt kv_transfer_params ec_transfer_params"
    ),
    **{"stream": False, "priority": 0, "output_mode": "tokens", "request_id": "r", "sampling_params": {}},
}
# `trl vllm-serve`.
TRL = {
    **{
        "n": 1,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "max_tokens": 16,
    },
    **{"logprobs": 0, "structured_outputs_regex": None, "generation_kwargs": {}},
}
# Every control request has these two.
MESSAGE = nulls("rid http_worker_ipc")
UPDATE = {
    **MESSAGE,
    **{"flush_cache": True, "abort_all_requests": False, "weight_version": None, "torch_empty_cache": False},
}
SELECTED = {**UPDATE, "selector": "all", "load_format": None}
GROUP = {**MESSAGE, "group_name": "weight_update_group"}

PROMPT = {"input_ids": [1]}
MESSAGES = {"messages": [{"role": "user", "content": "x"}]}
TENSORS = {"names": ["a"], "dtypes": ["float32"], "shapes": [[1]]}
# The model, what it cannot be without, and the fields that the dialect's request has beside that.
REQUESTS: list[tuple[type[RequestModel], Defaults, Defaults]] = [
    (GenerateReqInput, PROMPT, GENERATE),
    (SamplingParamsInput, {}, SAMPLING),
    (CompletionRequest, {"prompt": [1]}, COMPLETION),
    (ChatCompletionRequest, MESSAGES, CHAT),
    (CompletionRequest, {"prompt": [1]}, VLLM_COMPLETION),
    (ChatCompletionRequest, MESSAGES, VLLM_CHAT),
    (TokenRequest, {"token_ids": [1]}, VLLM_TOKENS),
    (VllmSamplingParams, {}, VLLM_SAMPLING),
    (TrlGenerateRequest, {"prompts": [[1]]}, {**TRL, "images": None}),
    (TrlChatRequest, {"messages": [MESSAGES["messages"]]}, {**TRL, "chat_template_kwargs": {}, "tools": None}),
    (StreamOptions, {}, falses("include_usage continuous_usage_stats")),
    (
        TokenizeInput,
        {"prompt": "x"},
        {
            **nulls("messages tools tool_choice reasoning_effort chat_template_kwargs add_generation_prompt"),
            **{"model": "default", "continue_final_message": False, "add_special_tokens": True},
        },
    ),
    (DetokenizeInput, {"tokens": [1]}, {"model": "default", "skip_special_tokens": True}),
    (
        AbortRequestInput,
        {},
        {**MESSAGE, **falses("abort_all"), **nulls("finished_reason abort_message weight_versions")},
    ),
    (body_model(PauseGeneration), {}, {**MESSAGE, "mode": "abort"}),
    (body_model(ContinueGeneration), {}, {**MESSAGE, "torch_empty_cache": True}),
    (
        body_model(UpdateWeightsFromDisk),
        {"model_path": "m"},
        {
            **UPDATE,
            **falses("is_async keep_pause recapture_cuda_graph"),
            **{"load_format": None, "token_step": 0, "manifest": None},
        },
    ),
    (body_model(UpdateWeightsFromDistributed), TENSORS, {**SELECTED, **GROUP}),
    # The dialect's own field for tensors is pickled.
    (body_model(UpdateWeightsFromTensor), {"path": "p"}, {**SELECTED, "serialized_named_tensors": None}),
    (
        body_model(InitWeightsUpdateGroup),
        {"master_address": "h", "master_port": 1, "rank_offset": 1, "world_size": 2},
        {**GROUP, "backend": "nccl"},
    ),
    (body_model(DestroyWeightsUpdateGroup), {}, GROUP),
    (body_model(UpdateWeightVersion), {"new_version": "v"}, {**MESSAGE, "abort_all_requests": True}),
    (body_model(GetWeightsByName), {"name": "a"}, {**MESSAGE, "truncate_size": 100}),
    (body_model(ReleaseMemoryOccupation), {}, {**MESSAGE, "tags": None}),
    (body_model(ResumeMemoryOccupation), {}, {**MESSAGE, "tags": None}),
    (
        body_model(CheckWeights),
        {},
        {
            **MESSAGE,
            **{"action": "checksum", "allow_quant_error": False, "skip_tensor_list": None, "selector": "all"},
        },
    ),
]
IDS = [model.__name__ for model, _, _ in REQUESTS]


@pytest.mark.parametrize(("model", "needed", "defaults"), REQUESTS, ids=IDS)
def test_every_field_of_the_dialect_is_taken_at_its_default(
    model: type[RequestModel], needed: Defaults, defaults: Defaults
) -> None:
    for name, default in defaults.items():
        validate(model, {name: default} | needed)
        validate(model, {name: None} | needed)
    validate(model, defaults | needed)


@pytest.mark.parametrize(("model", "needed", "defaults"), REQUESTS, ids=IDS)
def test_what_is_not_implemented_is_taken_where_it_asks_for_nothing_and_else_refused_by_name(
    model: type[RequestModel], needed: Defaults, defaults: Defaults
) -> None:
    assert not model.neutral_fields.keys() & {*model.model_fields, *model.ignored_fields}
    for name, legal in model.neutral_fields.items():
        for value in (None, False, [], {}, [None, None], *legal):
            validate(model, {name: value} | needed)
        for value in (True, 1.5, "odd", ["odd"], {"a": 1}, [None, 7]):
            if is_neutral(value, legal):
                continue
            with pytest.raises(ValueError, match=f"^{name} is not supported: must be .*absent$"):
                validate(model, {name: value} | needed)


@pytest.mark.parametrize(("model", "needed", "defaults"), REQUESTS, ids=IDS)
def test_every_field_is_one_of_three_kinds(model: type[RequestModel], needed: Defaults, defaults: Defaults) -> None:
    known = {*model.model_fields, *model.ignored_fields, *model.neutral_fields}
    assert {*defaults, *needed} <= known, "a field of the dialect is unknown"
    with pytest.raises(ValueError, match=r"^colour: is no field"):
        validate(model, {"colour": "red"} | needed)


def test_one_is_no_true_and_nesting_has_a_bound() -> None:
    assert is_neutral(1, (1,)) and not is_neutral(True, (1,))
    assert is_neutral([[None], [[]]]) is False and is_neutral([[None]])
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    assert not is_neutral(deep)


def test_the_table_names_each_field_once_per_request() -> None:
    for table in (dialect_fields.GENERATE, dialect_fields.SAMPLING, dialect_fields.OPENAI):
        assert all(isinstance(legal, tuple) for legal in table.values())
