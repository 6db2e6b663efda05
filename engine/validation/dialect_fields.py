"""Fields of sglang's requests (0.5.23) that are not implemented here, in one table: field -> the values that mean nothing.

A class of the dialect has three kinds of fields: those that a model here declares; those of `IGNORED`, which change nothing
in a result and may have any value; and those of the tables below. Of these null, false, an empty list or object and a list
of such (a batch has one entry an item) are always legal, and so are the values that the table names: a field's default
where that is something else. Anything else is refused by name, never dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Neutral = Mapping[str, tuple[Any, ...]]
# A list for each item of a batch, with a list for each of its parts.
MAX_LIST_DEPTH = 2


def off(*names: str) -> dict[str, tuple[Any, ...]]:
    """Fields whose default is null, false or empty."""
    return dict.fromkeys(names, ())


# Values of another kind than text, and what is made of them.
MEDIA = off(
    "video_data",
    "audio_data",
    "mm_hashes",
    "mm_content_hashes",
    "use_audio_in_video",
    "video_config",
    "images_config",
    "mm_processor_kwargs",
    "max_dynamic_patch",
    "min_dynamic_patch",
    "image_max_dynamic_patch",
    "video_max_dynamic_patch",
    "need_wait_for_mm_inputs",
    "num_items_assigned",
    "encoder_urls",
)
# Where another engine did the prefill; the room says which of its dp ranks.
DISAGGREGATION = off(
    "bootstrap_pair_key",
    "decode_tp_size",
    "disagg_prefill_dp_rank",
)
# Sessions with state in the server, adapters, code of the caller's.
FEATURES = off("session_params", "lora_path", "lora_id", "custom_logit_processor", "watermark")
# More to return than there is.
RETURNS = {
    **off(
        "return_hidden_states",
        "return_sampling_mask",
        "return_flat_raw_output_top_logprobs",
        "return_prompt_token_ids",
        "return_cached_tokens_details",
        "return_spec_tokens_details",
    ),
    "sampling_logprobs_mode": ("selected",),
}
# Grammars and other bounds on what is sampled.
CONSTRAINTS = off("stop_regex", "custom_params")

GENERATE: Neutral = {
    "return_token_ids": (),
    **MEDIA,
    **DISAGGREGATION,
    **FEATURES,
    **RETURNS,
    **off(
        "input_embeds",
        "positional_embed_overrides",
        "token_ids_logprob",
        "return_flat_raw_top_logprobs",
        "return_flat_raw_top_logprobs_b64",
        "return_indexer_topk",
        "return_bytes",
        "return_entropy",
        "background",
        "require_reasoning",
        "max_thinking_tokens",
        "multi_item_delimiter_indices",
        "token_indices_to_pool",
    ),
    "modalities": (["text"],),
}
SAMPLING: Neutral = {
    **CONSTRAINTS,
    # What a normalised object of the dialect's has beside its parameters.
    **off(
        "beam_width",
        "watermark",
        "stop_strs",
        "stop_regex_strs",
        "is_normalized",
        "ebnf_full_assistant",
    ),
    "stop_str_max_len": (0,),
    "stop_regex_max_len": (0,),
}
# Of vLLM's requests (0.22) what is not known under the same name above.
VLLM_SAMPLING: Neutral = {
    **off(
        "ec_transfer_params",
        "kv_transfer_params",
        "logprob_token_ids",
        "repetition_detection",
        "return_token_offsets",
        "truncate_prompt_tokens",
        "truncation_side",
        "use_beam_search",
        "vllm_xargs",
        "watermarking",
    ),
    "length_penalty": (1.0,),
    "thinking_token_budget": (-1,),
}
VLLM_GENERATE: Neutral = {
    **{name: VLLM_SAMPLING[name] for name in ("ec_transfer_params", "kv_transfer_params")},
    **off("content_parts", "features", "reasoning_ended", "reasoning_parser_kwargs", "token_offsets"),
    "output_mode": ("tokens",),
}
VLLM_GENERATE_SAMPLING: Neutral = {
    **{
        name: VLLM_SAMPLING[name]
        for name in ("logprob_token_ids", "repetition_detection", "thinking_token_budget", "watermarking")
    },
    **off("extra_args", "prompt_logprob_start", "prompt_logprob_token_ids", "skip_reading_prefix_cache"),
    **off("trace_decode_token_ids"),
}
# Inside `structured_outputs`.
VLLM_STRUCTURED_OUTPUTS: Neutral = off(
    *("disable_any_whitespace", "disable_additional_properties", "disable_fallback", "whitespace_pattern")
)
# How values are written that this server writes in one way.
VLLM_SAMPLING_IGNORED = (
    *("detokenize", "flat_logprobs", "output_kind", "output_text_buffer_length", "skip_clone"),
    *("skip_special_tokens", "spaces_between_special_tokens", "stream_interval"),
)
# `trl vllm-serve`.
TRL_GENERATE: Neutral = off("images", "structured_outputs")
# Memory of a trainer's on the ranks' own devices, pickled; updates of single elements.
VLLM_TRANSFER: Neutral = off("ipc_handles", "ipc_handles_pickled", "num_updates_list", "sizes", "tensor_sizes")
VLLM_CONTROL_IGNORED = ("model",)
VLLM_RESET: Neutral = off("reset_external")
VLLM_RPC: Neutral = off("args", "timeout")
OPENAI: Neutral = {
    **VLLM_SAMPLING,
    **MEDIA,
    # Here images are parts of messages.
    **off("image_data"),
    **DISAGGREGATION,
    **FEATURES,
    **RETURNS,
    **CONSTRAINTS,
    **off(
        "audio",
        "functions",
        "prediction",
        "reasoning_effort",
        "return_input_ids_in_sglext",
        "return_output_ids_in_sglext",
        "task",
        "thinking",
        "verbosity",
        "web_search_options",
    ),
    "best_of": (1,),
    # Older than tools.
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "suffix": ("",),
}
# A chat has these.
COMPLETION: Neutral = {
    **OPENAI,
    **off("tools", "prompt_embeds"),
    "tool_choice": ("none", "auto"),
    "add_special_tokens": (True,),
}
CHAT: Neutral = {
    **OPENAI,
    **off("add_special_tokens", "chat_template", "documents", "echo", "media_io_kwargs", "return_prompt_text"),
    "include_reasoning": (True,),
}
TOKENIZE: Neutral = {
    **off("reasoning_effort", "chat_template", "media_io_kwargs", "return_token_strs"),
    "tool_choice": ("none", "auto"),
}

# What every message between the dialect's own processes has.
MESSAGE: Neutral = off("rid", "http_worker_ipc")
# Which models of a server; there is one.
SELECTOR: Neutral = {"selector": ("all", "target")}
BEGIN_UPDATE: Neutral = {**MESSAGE, **SELECTOR}
UPDATE: Neutral = {
    **BEGIN_UPDATE,
    **off("is_async", "keep_pause", "recapture_cuda_graph", "manifest"),
}
CHECK_WEIGHTS: Neutral = {**BEGIN_UPDATE, **off("allow_quant_error")}
ABORT: Neutral = off("http_worker_ipc", "finished_reason", "weight_versions")

# Change nothing in a result: notes of the caller's, and hints for logs, metrics, caches and parsers that are not there.
NOTES = ("custom_labels", "model")
GENERATE_IGNORED = (
    *NOTES,
    "log_metrics",
    "no_logs",
    "conversation_id",
    "external_trace_header",
    "http_worker_ipc",
    "kv_hints",
    "received_time",
)
# Tokenizers of this kind put no spaces of their own between tokens, and streams are cumulative.
SAMPLING_IGNORED = ("spaces_between_special_tokens", "stream_interval")
OPENAI_IGNORED: tuple[str, ...] = (
    "custom_labels",
    "metadata",
    "prompt_cache_key",
    # How a field that is refused would be written.
    "return_flat_raw_top_logprobs_b64",
    "safety_identifier",
    "service_tier",
    "spaces_between_special_tokens",
    "return_mm_kwargs",
    "store",
    "stream_interval",
    "user",
)
COMPLETION_IGNORED: tuple[str, ...] = (*OPENAI_IGNORED, "parallel_tool_calls", "separate_reasoning", "stream_reasoning")
CONTROL_IGNORED = (
    "torch_empty_cache",
    "token_step",
    # AReaL's spelling of `abort_all_requests`, which the dialect drops, too.
    "abort_all_request",
)


def is_neutral(value: Any, legal: tuple[Any, ...] = (), depth: int = MAX_LIST_DEPTH) -> bool:
    """Whether a value of a field that is not implemented asks for nothing."""
    # JSON's true is no 1.
    if any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in legal):
        return True
    if isinstance(value, list) and depth:
        return all(is_neutral(item, legal, depth - 1) for item in value)
    return value is None or value is False or value == {}


def legal_words(legal: tuple[Any, ...]) -> str:
    """What a refusal says of the legal values."""
    return " or ".join([*map(repr, legal), "absent"])
