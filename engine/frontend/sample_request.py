"""One sample of one prompt, as it goes to the engine."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np

from ..io_struct import OutputOptions, SamplingParams, TransferSource
from ..validation.field_error import FieldError
from ..validation.token_ids import Ids
from ..vision.image_store import StoredImage
from ..vision.placed_image import PlacedImage
from .request_limits import EngineLimits, check_transfer
from .sampling_params import SamplingParamsInput


@dataclass(frozen=True)
class SharedPrefix:
    """Rows [start, end) that this sample shares with an earlier choice of its prompt, whose answer has them."""

    choice: int
    start: int
    end: int


@dataclass(frozen=True)
class SampleRequest:
    """One sample of one prompt, fully checked. With `is_auto` its rows begin where the session's caller has them, and for
    all but a prompt's first sample behind the `shared_prefix`."""

    rid: str
    item: int
    input_ids: Ids
    sampling_params: SamplingParams
    output_options: OutputOptions
    is_auto: bool = False
    shared_prefix: SharedPrefix | None = None
    transfer: TransferSource | None = None
    # False where another engine's answer has the prompt's log-probabilities: routers put these in front of them.
    returns_prompt: bool = True
    # Which it must go to, whatever the request says.
    dp_rank: int | None = None
    # In order, and the memory that they are in; what caches know the ids by, where that is something else.
    images: tuple[PlacedImage, ...] = ()
    stored: tuple[StoredImage, ...] = ()
    cache_ids: Ids | None = None

    @property
    def keys(self) -> Ids:
        """The prompt as sessions and caches know it: tokens of other images are other ones."""
        return self.input_ids if self.cache_ids is None else self.cache_ids


def check_rooms(sources: Sequence[TransferSource | None]) -> None:
    """`sources`: one for each prompt of a batch, None where it stays on this engine.

    Raises:
        FieldError: two prompts have one room, so that one would get the other's pages, or none.
    """
    taken: dict[str, int] = {}
    for index, source in enumerate(sources):
        if source is not None and taken.setdefault(source.key, index) != index:
            message = f"bootstrap_room={source.room}: item {taken[source.key]} has it"
            raise FieldError(message, "bootstrap_room").of_item(index)


def _digest(sample: SampleRequest) -> bytes:
    """Of what an answer that two engines make must be asked of both. Images are not in the ids, and each side numbers them
    by itself."""
    options = sample.output_options
    images = [image.content for image in sample.stored]
    asked = (options.return_logprob, options.logprob_start_len, options.top_logprobs_num, images)
    ids = np.ascontiguousarray(sample.input_ids, dtype="<i8")
    return hashlib.blake2b(msgspec.json.encode(asked) + ids.tobytes(), digest_size=16).digest()


def with_transfer(samples: list[SampleRequest], place: list[Any], limits: EngineLimits) -> list[SampleRequest]:
    """Samples of one prompt, with where the other side is (host, port and room); on a prefill's side they end with their
    first token, and only the other one has rows and the prompt's log-probabilities to return."""
    host, port, room = place
    if host is None and port is None and room is None:
        return samples
    check_transfer(host, port, room, limits)
    port = limits.bootstrap_port if port is None else port
    source = TransferSource(host or "", port, room, digest=_digest(samples[0]))
    moved = [replace(one, transfer=msgspec.structs.replace(source, sample=i)) for i, one in enumerate(samples)]
    if limits.disaggregation == "decode":
        return moved
    return [
        replace(
            one,
            dp_rank=room % limits.dp_size,
            returns_prompt=False,
            sampling_params=msgspec.structs.replace(
                one.sampling_params, max_new_tokens=min(1, one.sampling_params.max_new_tokens)
            ),
            output_options=msgspec.structs.replace(
                one.output_options,
                return_routed_experts=False,
                return_router_weights=False,
                routed_experts_start_len=0,
                stream_routed_experts=False,
            ),
        )
        for one in moved
    ]


def with_grammar(
    samples: list[SampleRequest],
    params: SamplingParamsInput,
    limits: EngineLimits,
    begins_after: int,
    known: dict[int, str],
) -> list[SampleRequest]:
    """Samples of one prompt, with what their output must follow. `known` are grammars by the parameters that prompts share:
    made once, and one text in memory."""
    if params.grammar_field is None:
        return samples
    if not limits.has_tokenizer:
        raise FieldError(f"{params.grammar_field}: the checkpoint has no tokenizer", params.grammar_field)
    if id(params) not in known:
        known[id(params)] = params.grammar(limits.special_tokens)
    fields = {"grammar": known[id(params)], "grammar_begins_after": begins_after}
    return [replace(one, sampling_params=msgspec.structs.replace(one.sampling_params, **fields)) for one in samples]
