"""What a running engine can take, and the checks of one prompt against it; every refusal names the field and its range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .sampling_input import SamplingParamsInput

MAX_TOP_LOGPROBS = 100
DEFAULT_MAX_NEW_TOKENS = 128


@dataclass(frozen=True)
class EngineLimits:
    """What a running engine can take."""

    context_length: int
    kv_cache_tokens: int
    vocab_size: int
    dp_size: int
    has_tokenizer: bool
    routed_experts: bool


def check_prompt(input_ids: list[int], limits: EngineLimits) -> None:
    if not input_ids:
        raise ValueError("the prompt is empty: must have at least one token")
    if len(input_ids) > limits.context_length:
        raise ValueError(
            f"the prompt has {len(input_ids)} tokens: must have at most {limits.context_length} (context_length)"
        )
    ids = np.asarray(input_ids)
    if ids.min() < 0 or ids.max() >= limits.vocab_size:
        bad = int(ids[(ids < 0) | (ids >= limits.vocab_size)][0])
        raise ValueError(f"input_ids: {bad} is no token, ids lie in 0 .. {limits.vocab_size - 1}")


def resolve_max_new_tokens(params: SamplingParamsInput, num_prompt: int, limits: EngineLimits) -> int:
    """What was asked for, if it fits; the default is cut to what fits."""
    room = limits.context_length - num_prompt
    # The last token is sampled and never becomes an input, so it needs no KV slot.
    kv_room = limits.kv_cache_tokens - num_prompt + 1
    if kv_room < 1:
        raise ValueError(
            f"the prompt has {num_prompt} tokens: must have at most {limits.kv_cache_tokens} (kv_cache_tokens)"
        )
    if params.max_new_tokens is None:
        most = min(room, kv_room)
        if params.min_new_tokens > most:
            raise ValueError(
                f"min_new_tokens={params.min_new_tokens} with {num_prompt} prompt tokens: must be at most {most}"
            )
        return max(min(DEFAULT_MAX_NEW_TOKENS, most), params.min_new_tokens)
    if params.max_new_tokens > room:
        raise ValueError(
            f"max_new_tokens={params.max_new_tokens} with {num_prompt} prompt tokens: together they must be at most "
            f"{limits.context_length} (context_length)"
        )
    if params.max_new_tokens > kv_room:
        raise ValueError(
            f"max_new_tokens={params.max_new_tokens} with {num_prompt} prompt tokens: together they must be at most "
            f"{limits.kv_cache_tokens + 1} (kv_cache_tokens + 1)"
        )
    return params.max_new_tokens


def check_sampling(params: SamplingParamsInput, limits: EngineLimits) -> None:
    for name, ids in (("logit_bias", params.logit_bias or {}), ("stop_token_ids", params.stop_token_ids or [])):
        bad = [token for token in ids if not 0 <= token < limits.vocab_size]
        if bad:
            raise ValueError(f"{name}: {bad[0]} is no token, ids lie in 0 .. {limits.vocab_size - 1}")
    if params.stop_strings and not limits.has_tokenizer:
        raise ValueError("stop: the checkpoint has no tokenizer; give stop_token_ids")


def check_logprobs(fields: dict[str, Any], num_prompt: int, limits: EngineLimits) -> None:
    start, top = fields["logprob_start_len"], fields["top_logprobs_num"]
    if not -1 <= start <= num_prompt:
        raise ValueError(f"logprob_start_len={start}: must lie in -1 (output only) .. {num_prompt} (prompt tokens)")
    most = min(MAX_TOP_LOGPROBS, limits.vocab_size)
    if not 0 <= top <= most:
        raise ValueError(f"top_logprobs_num={top}: must lie in 0 .. {most}")


def check_routed_experts(fields: dict[str, Any], num_prompt: int, limits: EngineLimits) -> None:
    """Only for those who opted in; the wording is what clients of the field look for."""
    if not fields["return_routed_experts"]:
        return
    start = fields["routed_experts_start_len"]
    if not limits.routed_experts:
        raise ValueError(
            "return_routed_experts: the engine was started without routing; start it with "
            "--enable-return-routed-experts (enable_return_routed_experts=True)"
        )
    if start < 0:
        raise ValueError(f"routed_experts_start_len={start} is lower than 0: must lie in 0 .. {num_prompt}")
    if start > num_prompt:
        raise ValueError(
            f"routed_experts_start_len={start} is higher than the number of input tokens ({num_prompt}): must lie in "
            f"0 .. {num_prompt}"
        )
