"""What the GPU benchmark runs: the model's shape, the sizes of its workloads, and the report that it fills."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from model_shapes import SHAPES

from waybill.engine.io_struct import SamplingParams

NUM_WARM_UPS = 8
# What a request has beside its context in the KV pool, at most.
SPARE_TOKENS = 128
# Of prefills that follow each other.
NUM_PROMPTS = 16
MILLI = 1e3
# What the rows of the decode table ask for.
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
SAMPLED = {
    "temperature 1": SamplingParams(temperature=1.0, ignore_eos=True),
    "temperature 1, top_p 0.95, top_k 50": SamplingParams(temperature=1.0, top_p=0.95, top_k=50, ignore_eos=True),
    "temperature 1, top_p 0.95": SamplingParams(temperature=1.0, top_p=0.95, ignore_eos=True),
}


@dataclass(frozen=True)
class Plan:
    """Sizes of one run."""

    device: str
    shape: dict[str, Any]
    batches: tuple[int, ...]
    prefills: tuple[int, ...]
    wide_shape: str
    num_prompts: int
    # Requests of a layout of several devices, in all.
    totals: tuple[int, ...]
    # A small model of the shape's kind, for routes in float32.
    route_shape: str
    # Tokens before the first of a decode, and steps that are timed, eight more being run.
    context: int = 512
    num_steps: int = 48
    # Linear and expert layers in block FP8; compared with the same in bfloat16.
    is_fp8: bool = False

    @property
    def kv_tokens(self) -> int:
        """Of the pool. Two prompts have room at once, or ranks whose second one has to wait would take other steps."""
        return max(max(self.batches) * (self.context + SPARE_TOKENS), 2 * (max(self.prefills) + SPARE_TOKENS))

    def decode_tokens(self, batch: int) -> int:
        """New tokens of each of `batch` requests: those that are prefilled first decode while the others are."""
        num_prefill_steps = -(-batch * self.context // max(self.prefills))
        num_tokens = num_prefill_steps + NUM_WARM_UPS + self.num_steps + 4
        assert num_tokens <= SPARE_TOKENS
        return num_tokens


TOTALS = (1, 8, 64, 256, 1024)
FULL = Plan("cuda", SHAPES["30b"], (1, 8, 64, 256), (2048, 8192), "wide", 24, TOTALS, "wide")
TOY = Plan("cpu", SHAPES["toy30b"], (1, 4), (64,), "T", 6, (1, 8), "toy30b", context=32, num_steps=12)
# By the name of the shape.
FULL_PLANS = {
    "30b": FULL,
    "30b-fp8": replace(FULL, is_fp8=True),
    "moonlight": replace(FULL, shape=SHAPES["moonlight"], wide_shape="moonlight2"),
}
TOY_PLANS = {
    "30b": TOY,
    "30b-fp8": replace(TOY, is_fp8=True),
    "moonlight": replace(TOY, shape=SHAPES["toymoonlight"], wide_shape="toymoonlight"),
}


@dataclass
class Report:
    """Lines of Markdown and the numbers behind them; printed as they come, so that nothing is lost with the machine."""

    lines: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    def add(self, *lines: str) -> None:
        self.lines += lines
        print(*lines, sep="\n", flush=True)
