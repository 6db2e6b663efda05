"""How one sample fares, and what its outputs are in the API's form."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from typing import Any, Literal

import msgspec

from ..io_struct import FinishReason, Logprobs, RequestOutput
from ..routing.wire import RoutedExperts, RouterWeights, to_base64, to_npy_base64
from .answer_logprobs import AnswerLogprobs, TokenText
from .sample_request import SampleRequest

# How rows stand in an answer: a numpy array, base64 text, or that text as JSON, which is written out as it is.
RoutesForm = Literal["array", "base64", "json"]


def finish_reason_dict(reason: FinishReason) -> dict[str, Any]:
    """The dialect's form: `type` and whatever belongs to it."""
    match reason.type:
        case "stop":
            return {"type": "stop", "matched": reason.matched}
        case "length":
            return {"type": "length", "length": reason.length}
        case _:
            error = {"status_code": reason.status_code, "err_type": reason.err_type}
            return {"type": "abort", "message": reason.message, **({} if reason.status_code is None else error)}


class GenerationError(RuntimeError):
    """The engine could not go on with a request, for the reason that the message gives. It is alive, and so are others."""


class Answer:
    """Follows the outputs of one sample: a stream has one a step, each with what is new, any other answer one in all.

    In the form "array" the compact format is a numpy array [rows, moe_layers, top_k]; int32 is base64 there, too.
    """

    def __init__(
        self,
        sample: SampleRequest,
        num_layers_total: int,
        *,
        form: RoutesForm,
        token_text: TokenText | None,
    ) -> None:
        self.rid = sample.rid
        self.prompt_tokens = len(sample.input_ids)
        self._options = sample.output_options
        self._shared_prefix = sample.shared_prefix
        self._form = form
        self._num_layers_total = num_layers_total
        self.began = time.perf_counter()
        self.completion_tokens = 0
        self._logprobs: AnswerLogprobs | None = None
        if self._options.return_logprob:
            self._logprobs = AnswerLogprobs(self._options, token_text, has_prompt=sample.returns_prompt)
        self._last: RequestOutput | None = None
        self._routed: RoutedExperts | None = None

    @property
    def is_finished(self) -> bool:
        return self._last is not None and self._last.finish_reason is not None

    @property
    def outcome(self) -> str:
        """How it ended: stop, length, abort or failed."""
        assert self._last is not None and self._last.finish_reason is not None
        return "failed" if self.failure is not None else self._last.finish_reason.type

    @property
    def failure(self) -> str | None:
        """Why the engine has failed it; None if it has not."""
        reason = None if self._last is None else self._last.finish_reason
        return reason.message if reason is not None and reason.is_failure else None

    @property
    def cached_tokens(self) -> int:
        return 0 if self._last is None else self._last.cached_tokens

    @property
    def routed_experts_error(self) -> str | None:
        return None if self._last is None else self._last.routed_experts_error

    def add(self, output: RequestOutput, routed: RoutedExperts | None) -> None:
        self._last = output
        self.completion_tokens += len(output.token_ids)
        self._routed = routed

    async def render(self) -> dict[str, Any]:
        """The last output: `{text, output_ids, meta_info}`. Text, ids, log-probabilities and rows are what is new in it,
        the rest is the state now."""
        last = self._last
        assert last is not None
        meta: dict[str, Any] = {
            "id": self.rid,
            "finish_reason": None if last.finish_reason is None else finish_reason_dict(last.finish_reason),
            "prompt_tokens": last.prompt_tokens,
            "completion_tokens": last.completion_tokens,
            "cached_tokens": last.cached_tokens,
            "weight_version": last.weight_version,
            "weight_versions": [
                {"version": version, "start": start, "end": end} for version, start, end in last.token_weight_versions
            ],
            "e2e_latency": time.perf_counter() - self.began,
            "dp_rank": last.dp_rank,
            "num_retractions": last.num_retractions,
        }
        if self._logprobs is not None:
            meta.update(self._logprobs.render(last.logprobs or Logprobs(), last.token_ids))
        if self._options.return_routed_experts and (self.is_finished or self._options.stream_routed_experts):
            meta.update(await self._render_routes(last))
        return {"text": last.text, "output_ids": last.token_ids, "meta_info": meta}

    async def _render_routes(self, last: RequestOutput) -> dict[str, Any]:
        """Rows in the asked form beside their envelope, a claim in their place, or the reason why there are none."""
        envelope = last.routed_experts
        reason = last.finish_reason
        form = self._options.routed_experts_format
        if reason is not None and reason.type == "abort" and not self.completion_tokens and form != "compact":
            # Readers of these forms count on the rows of all tokens but the last, or on none.
            return {}
        if envelope is None:
            error = last.routed_experts_error
            weights = {"router_weights": None, "router_weights_error": error}
            return {
                "routed_experts": None,
                "routed_experts_error": error,
                **(weights if self._options.return_router_weights else {}),
            }
        fields: dict[str, Any] = {
            "routed_experts_meta": msgspec.to_builtins(envelope),
            "routed_experts_start_len": envelope.start,
            "routed_experts_dtype": "int32" if form == "int32" else envelope.dtype,
        }
        if self._shared_prefix is not None:
            fields["routed_experts_prefix"] = asdict(self._shared_prefix)
        if last.routed_experts_claim is not None:
            return fields | {"routed_experts_claim": last.routed_experts_claim}
        assert self._routed is not None
        if self._routed.weights is not None:
            fields |= await self._render_weights(self._routed.weights)
        if self._form == "array" and form == "compact":
            return fields | {"routed_experts": self._routed.rows}
        # Encoding 32k rows takes a quarter of a second: not on the event loop.
        if form == "npy":
            encoded = await asyncio.to_thread(to_npy_base64, self._routed, self._num_layers_total)
        else:
            num_layers = self._num_layers_total if form == "int32" else None
            encoded = await asyncio.to_thread(to_base64, self._routed, num_layers)
        return fields | {"routed_experts": self._text(encoded)}

    async def _render_weights(self, weights: RouterWeights) -> dict[str, Any]:
        """The combine weights of the same rows, whose form is the compact one beside all forms of ids."""
        envelope = msgspec.to_builtins(weights.meta)
        if self._form == "array" and self._options.routed_experts_format == "compact":
            return {"router_weights": await asyncio.to_thread(weights.as_float32), "router_weights_meta": envelope}
        encoded = await asyncio.to_thread(to_base64, weights)
        return {"router_weights": self._text(encoded), "router_weights_meta": envelope}

    def _text(self, encoded: bytes) -> msgspec.Raw | str:
        return as_json(encoded) if self._form == "json" else encoded.decode("ascii")


def as_json(base64_text: bytes) -> msgspec.Raw:
    """A JSON string of text that needs no escapes, for an encoder to copy instead of to scan."""
    return msgspec.Raw(b'"' + base64_text + b'"')
