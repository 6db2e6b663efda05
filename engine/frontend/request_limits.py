"""What a running engine can take, and the checks of one prompt against it; every refusal names the field and its range."""

from __future__ import annotations

from dataclasses import dataclass

from ..io_struct import OutputOptions
from ..validation.field_error import FieldError
from ..validation.host_names import MAX_HOST_LENGTH, may_have_prompts
from ..validation.token_ids import Ids
from .sampling_params import SamplingParamsInput

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
    router_weights: bool = False
    # Of the tokenizer, by their text.
    special_tokens: frozenset[str] = frozenset()
    # Which side of two engines it is, and at which port another one is by default.
    disaggregation: str = "none"
    bootstrap_port: int = 0
    bootstrap_hosts: tuple[str, ...] = ()
    # What stands for an image's tokens; None: prompts have no images.
    image_token_id: int | None = None

    def room_for(self, num_prompt: int) -> int:
        """Output tokens that fit behind a prompt."""
        return max(0, min(self.context_length - num_prompt, self.kv_cache_tokens - num_prompt + 1))


def check_prompt(input_ids: Ids, limits: EngineLimits, field: str) -> None:
    """`field` is the one that the caller gave the prompt in."""
    if not len(input_ids):
        raise FieldError("the prompt is empty: must have at least one token", field)
    num, most = len(input_ids), limits.context_length
    if num > most:
        raise FieldError(f"the prompt has {num} tokens: must have at most {most} (context_length)", field)
    if num > limits.kv_cache_tokens:
        raise FieldError(
            f"the prompt has {num} tokens: must have at most {limits.kv_cache_tokens} (kv_cache_tokens)", field
        )
    if input_ids.min() < 0 or input_ids.max() >= limits.vocab_size:
        bad = int(input_ids[(input_ids < 0) | (input_ids >= limits.vocab_size)][0])
        raise FieldError(f"{field}: {bad} is no token, ids lie in 0 .. {limits.vocab_size - 1}", field)


def resolve_max_new_tokens(params: SamplingParamsInput, num_prompt: int, limits: EngineLimits) -> int:
    """What was asked for, if it fits; the default is cut to what fits."""
    room = limits.context_length - num_prompt
    # The last token is sampled and never becomes an input, so it needs no KV slot.
    kv_room = limits.kv_cache_tokens - num_prompt + 1
    if params.max_new_tokens is None:
        most = min(room, kv_room)
        if params.min_new_tokens > most:
            raise FieldError(
                f"min_new_tokens={params.min_new_tokens} with {num_prompt} prompt tokens: must be at most {most}",
                "min_new_tokens",
            )
        return max(min(DEFAULT_MAX_NEW_TOKENS, most), params.min_new_tokens)
    if params.max_new_tokens > room:
        raise FieldError(
            f"max_new_tokens={params.max_new_tokens} with {num_prompt} prompt tokens: together they must be at most "
            f"{limits.context_length} (context_length)",
            "max_new_tokens",
        )
    if params.max_new_tokens > kv_room:
        raise FieldError(
            f"max_new_tokens={params.max_new_tokens} with {num_prompt} prompt tokens: together they must be at most "
            f"{limits.kv_cache_tokens + 1} (kv_cache_tokens + 1)",
            "max_new_tokens",
        )
    return params.max_new_tokens


def check_sampling(params: SamplingParamsInput, limits: EngineLimits) -> None:
    lists = {name: getattr(params, name) or [] for name in ("logit_bias", "stop_token_ids", "allowed_token_ids")}
    for name, ids in lists.items():
        bad = [token for token in ids if not 0 <= token < limits.vocab_size]
        if bad:
            raise FieldError(f"{name}: {bad[0]} is no token, ids lie in 0 .. {limits.vocab_size - 1}", name)
    if params.stop_strings and not limits.has_tokenizer:
        raise FieldError("stop: the checkpoint has no tokenizer; give stop_token_ids", "stop")


def check_logprobs(options: OutputOptions, num_prompt: int, limits: EngineLimits) -> None:
    start, top = options.logprob_start_len, options.top_logprobs_num
    if not -1 <= start <= num_prompt:
        raise FieldError(
            f"logprob_start_len={start}: must lie in -1 (output only) .. {num_prompt} (prompt tokens)",
            "logprob_start_len",
        )
    most = min(MAX_TOP_LOGPROBS, limits.vocab_size)
    if not 0 <= top <= most:
        raise FieldError(f"top_logprobs_num={top}: must lie in 0 .. {most}", "top_logprobs_num")


def check_routed_experts(options: OutputOptions, num_prompt: int, limits: EngineLimits) -> None:
    """Only for those who opted in; the wording is what clients of the field look for."""
    check_router_weights(options, limits)
    if not options.return_routed_experts:
        return
    name = "routed_experts_start_len"
    start = options.routed_experts_start_len
    if not limits.routed_experts:
        raise FieldError(
            "return_routed_experts: the engine was started without routing; start it with "
            "--enable-return-routed-experts (enable_return_routed_experts=True)",
            "return_routed_experts",
        )
    if start < 0:
        raise FieldError(f"routed_experts_start_len={start} is lower than 0: must lie in 0 .. {num_prompt}", name)
    if start > num_prompt:
        raise FieldError(
            f"routed_experts_start_len={start} is higher than the number of input tokens ({num_prompt}): must lie in "
            f"0 .. {num_prompt}",
            name,
        )


def check_transfer(host: str | None, port: int | None, room: int | None, limits: EngineLimits) -> None:
    """One of them is given."""
    given = [("bootstrap_host", host), ("bootstrap_port", port), ("bootstrap_room", room)]
    name = next(name for name, value in given if value is not None)
    if limits.disaggregation == "none":
        raise FieldError(
            f"{name} is not supported: must be absent, unless the engine is started with --disaggregation", name
        )
    if room is None:
        raise FieldError(f"{name}: needs bootstrap_room", name, mentions=("bootstrap_room",))
    if not 0 <= room < 2**63:
        raise FieldError(f"bootstrap_room={room}: must lie in 0 .. 2**63 - 1", "bootstrap_room")
    if port is not None and not 0 < port < 2**16:
        raise FieldError(f"bootstrap_port={port}: must lie in 1 .. {2**16 - 1}", "bootstrap_port")
    if host is None and limits.disaggregation == "decode":
        raise FieldError("bootstrap_host: must be given, the prefill's side", "bootstrap_host")
    # A prefill's side connects to nobody.
    if limits.disaggregation == "decode" and not may_have_prompts(str(host), limits.bootstrap_hosts):
        raise FieldError(
            f"bootstrap_host={str(host)[:MAX_HOST_LENGTH]!r}: must be loopback or one of --disaggregation-allowed-hosts",
            "bootstrap_host",
        )


def check_router_weights(options: OutputOptions, limits: EngineLimits) -> None:
    name = "return_router_weights"
    if not options.return_router_weights:
        return
    if not limits.router_weights:
        raise FieldError(
            f"{name}: the engine was started without them; start it with --enable-return-router-weights "
            "(enable_return_router_weights=True)",
            name,
        )
    if not options.return_routed_experts:
        raise FieldError(
            f"{name}: needs return_routed_experts=true, they are those of its rows",
            name,
            mentions=("return_routed_experts",),
        )
    if options.routed_experts_delivery != "inline":
        raise FieldError(
            f"{name}: needs routed_experts_delivery='inline', a claim stands for ids alone",
            name,
            mentions=("routed_experts_delivery",),
        )
