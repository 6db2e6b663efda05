"""A caller's answer as it grows, and its rendering in the API's form."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec

from .generate_request import GenerateReqInput, SampleRequest
from .io_struct import FinishReason, RequestOutput, TopLogprobs
from .routing.wire import RoutedExperts, to_compact_base64, to_int32_base64

LogprobTriple = tuple[float | None, int, None]


def finish_reason_dict(reason: FinishReason) -> dict[str, Any]:
    """The dialect's form: `type` and whatever belongs to it."""
    match reason.type:
        case "stop":
            return {"type": "stop", "matched": reason.matched}
        case "length":
            return {"type": "length", "length": reason.length}
        case _:
            return {"type": "abort", "message": reason.message}


class Answer:
    """Collects the outputs of one sample. Text and ids are cumulative, as streams of the dialect are.

    With `as_array` the compact form of the routes is a numpy array [rows, moe_layers, top_k] instead of base64.
    """

    def __init__(
        self, sample: SampleRequest, request: GenerateReqInput, num_layers_total: int, *, as_array: bool
    ) -> None:
        self.rid = sample.rid
        self._sample = sample
        self._format = request.routed_experts_format
        self._as_array = as_array and request.routed_experts_format == "compact"
        self._num_layers_total = num_layers_total
        self._began = time.perf_counter()
        self._text = ""
        self._output_ids: list[int] = []
        self._logprobs: list[LogprobTriple] = []
        self._top_logprobs: list[list[LogprobTriple]] = []
        self._input_logprobs: list[LogprobTriple] = []
        self._input_top_logprobs: list[list[LogprobTriple] | None] = []
        self._last: RequestOutput | None = None
        self._routed: RoutedExperts | None = None

    @property
    def is_finished(self) -> bool:
        return self._last is not None and self._last.finish_reason is not None

    def add(self, output: RequestOutput, routed: RoutedExperts | None) -> None:
        self._last = output
        self._text += output.text
        first = len(self._output_ids)
        self._output_ids += output.token_ids
        ids = self._output_ids[first:]
        if self._sample.return_logprob:
            self._logprobs += [(value, token, None) for value, token in zip(output.output_logprobs, ids, strict=True)]
            self._top_logprobs += [_triples(pairs) for pairs in output.output_top_logprobs]
            self._input_logprobs += [(value, token, None) for value, token in output.input_logprobs]
            self._input_top_logprobs += [None if p is None else _triples(p) for p in output.input_top_logprobs]
        if routed is not None:
            self._routed = routed

    async def render(self) -> dict[str, Any]:
        """The answer so far: `{text, output_ids, meta_info}`."""
        last = self._last
        assert last is not None
        meta: dict[str, Any] = {
            "id": self.rid,
            "finish_reason": None if last.finish_reason is None else finish_reason_dict(last.finish_reason),
            "prompt_tokens": last.prompt_tokens,
            "completion_tokens": last.completion_tokens,
            "cached_tokens": last.cached_tokens,
            "weight_version": last.weight_version,
            "e2e_latency": time.perf_counter() - self._began,
            "dp_rank": last.dp_rank,
            "num_retractions": last.num_retractions,
        }
        if self._sample.return_logprob:
            meta["output_token_logprobs"] = list(self._logprobs)
            if self._sample.logprob_start_len >= 0:
                meta["input_token_logprobs"] = list(self._input_logprobs)
            if self._sample.top_logprobs_num:
                meta["output_top_logprobs"] = list(self._top_logprobs)
                if self._sample.logprob_start_len >= 0:
                    meta["input_top_logprobs"] = list(self._input_top_logprobs)
        if self._sample.return_routed_experts and self.is_finished:
            meta.update(await self._render_routes(last))
        return {"text": self._text, "output_ids": list(self._output_ids), "meta_info": meta}

    async def _render_routes(self, last: RequestOutput) -> dict[str, Any]:
        """Rows in the asked form beside their envelope, a claim in their place, or the reason why there are none."""
        envelope = last.routed_experts
        if envelope is None:
            return {"routed_experts": None, "routed_experts_error": last.routed_experts_error}
        fields: dict[str, Any] = {
            "routed_experts_meta": msgspec.to_builtins(envelope),
            "routed_experts_start_len": envelope.start,
            "routed_experts_dtype": "int32" if self._format == "int32" else envelope.dtype,
        }
        if last.routed_experts_claim is not None:
            return fields | {"routed_experts_claim": last.routed_experts_claim}
        assert self._routed is not None
        if self._as_array:
            return fields | {"routed_experts": self._routed.rows}
        # Encoding 32k rows takes a quarter of a second: not on the event loop.
        if self._format == "int32":
            encoded = await asyncio.to_thread(to_int32_base64, self._routed, self._num_layers_total)
        else:
            encoded = await asyncio.to_thread(to_compact_base64, self._routed)
        return fields | {"routed_experts": encoded}


def _triples(pairs: TopLogprobs) -> list[LogprobTriple]:
    return [(value, token, None) for value, token in pairs]
