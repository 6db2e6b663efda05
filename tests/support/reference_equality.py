"""An engine's greedy answers against `transformers`: settings that must not change them, and the comparison."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from waybill import Engine
from waybill.engine.routing.transformers_reference import LOGPROB_TOLERANCE, Agreement, Reference

MAX_NEW_TOKENS = 12
# Over hundreds of tokens of noise the log-probabilities of transformers' own cached decoding differ from those of its
# full forward by up to 6e-5, and now and then by more.
LONG_ANSWER_TOLERANCE = 3e-4


@dataclass(frozen=True)
class Setting:
    """One combination of what must not change an answer."""

    tp: int
    split: str
    chunk: int
    cache: bool
    retract: bool
    depth: int
    dp: int = 1
    dispatcher: str = "all_gather"
    attention: str = "auto"

    def __str__(self) -> str:
        return "-".join(
            (
                *([f"dp{self.dp}", self.dispatcher] if self.dp > 1 else []),
                f"tp{self.tp}",
                self.split,
                f"chunk{self.chunk}" if self.chunk > 0 else "unchunked",
                "cache" if self.cache else "nocache",
                "retract" if self.retract else "roomy",
                f"depth{self.depth}",
                *([self.attention] if self.attention != "auto" else []),
            )
        )


@dataclass(frozen=True)
class Request:
    """What is asked, and of which dp rank (None: of any)."""

    prompt: list[int]
    num_new_tokens: int = MAX_NEW_TOKENS
    dp_rank: int | None = None


def make_engine(model_path: Path, setting: Setting, pool_tokens: int, device: str = "cpu", **options: Any) -> Engine:
    """In float32; `pool_tokens` are those of each dp rank's pool."""
    return Engine(
        str(model_path),
        tp_size=setting.tp,
        dp_size=setting.dp,
        moe_split=setting.split,
        moe_dispatcher=setting.dispatcher,
        device=device,
        dtype="float32",
        chunked_prefill_size=setting.chunk,
        enable_prefix_cache=setting.cache,
        page_size=4 if setting.retract else 1,
        kv_cache_tokens=pool_tokens,
        max_running_requests=16,
        overlap_depth=setting.depth,
        attention_backend=setting.attention,
        enable_return_routed_experts=True,
        enable_return_router_weights=True,
        **options,
    )


def ask(engine: Engine, requests: Sequence[Request]) -> list[dict[str, Any]]:
    """All at once; the answers in the order of the requests."""

    async def ask_all() -> list[dict[str, Any]]:
        return await asyncio.gather(
            *(
                engine.async_generate(
                    input_ids=request.prompt,
                    sampling_params={
                        "temperature": 0.0,
                        "max_new_tokens": request.num_new_tokens,
                        "ignore_eos": True,
                    },
                    routed_dp_rank=request.dp_rank,
                    return_logprob=True,
                    return_routed_experts=True,
                    return_router_weights=True,
                )
                for request in requests
            )
        )

    return asyncio.run(ask_all())


def compare(reference: Reference, requests: Sequence[Request], answers: Sequence[dict[str, Any]]) -> Agreement:
    """
    Raises:
        Difference: an answer is another than the reference's by more than a near-tie.
    """
    agreement = Agreement()
    for request, answer in zip(requests, answers, strict=True):
        meta = answer["meta_info"]
        assert request.dp_rank in (None, meta["dp_rank"])
        assert len(answer["output_ids"]) == request.num_new_tokens
        logprobs = [logprob for logprob, _, _ in meta["output_token_logprobs"]]
        tolerance = LONG_ANSWER_TOLERANCE if request.num_new_tokens > MAX_NEW_TOKENS else LOGPROB_TOLERANCE
        agreement += reference.check_generation(
            request.prompt, answer["output_ids"], logprobs, meta["routed_experts"], tolerance, meta["router_weights"]
        )
    return agreement
