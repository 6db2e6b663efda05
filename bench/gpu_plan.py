"""What the GPU benchmark runs: the model's shape, the sizes of its workloads, and the report that it fills."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from waybill.engine.io_struct import SamplingParams

SHAPE_30B: dict[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}
CONTEXT = 512
NUM_WARM_UPS, NUM_STEPS = 8, 48
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


FULL = Plan("cuda", SHAPE_30B, (1, 8, 64, 256), (2048, 8192), "wide", 24)
TOY_SHAPE = {**SHAPE_30B, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TOY_SHAPE |= {"head_dim": 16, "num_experts": 16, "moe_intermediate_size": 32, "vocab_size": 512}
TOY = Plan("cpu", TOY_SHAPE, (1, 4), (64,), "T", 6)


@dataclass
class Report:
    """Lines of Markdown and the numbers behind them; printed as they come, so that nothing is lost with the machine."""

    lines: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    def add(self, *lines: str) -> None:
        self.lines += lines
        print(*lines, sep="\n", flush=True)
