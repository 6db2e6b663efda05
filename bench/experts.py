"""One MoE layer on a CPU: our backends and `transformers`' grouped_mm block, over the same weights, in one run.

Every round times each contender once, one after another, so that what else the machine does touches all of them alike.
Each call takes the next of several layers, so that no weights are found in a cache.

    python bench/experts.py [--rounds 15] [--write]

Legend: T tokens, D hidden, E experts, K experts per token, I intermediate width.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import StringIO
from itertools import cycle
from typing import Any

import torch
from machine import describe, write_result
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from waybill.parallel.dp_attention import ReplicatedTokens
from waybill.parallel.mesh import Axis
from waybill.parallel.moe.dispatch import ReplicatedDispatcher
from waybill.parallel.moe.experts import Experts, experts_by_group
from waybill.parallel.moe.layer import MoeLayer
from waybill.parallel.moe.router import RouterConfig, TopKRouter
from waybill.parallel.weight_format import WeightFormat

D, E, K, I = 1024, 64, 8, 512
EXPERT_BYTES = 3 * D * I * 2
FLOPS_PER_PAIR = 6 * D * I
NUM_TOKENS = (1, 8, 32, 512, 2048)
NUM_LAYERS = 3
# Past this many tokens every expert's weights are used often enough for arithmetic to be the limit.
MANY_TOKENS = 256
OPTIONS: dict[str, Any] = {"weight_format": WeightFormat(torch.bfloat16, torch.device("cpu"))}
CONTENDERS = ("fast", "fast, torch only", "torch_reference", "transformers grouped_mm")

Block = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Yardsticks:
    """What the machine does at best in this run: reading a long tensor, and torch's bfloat16 matrix product."""

    read_bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class OwnBlock:
    """One of ours as a function of hidden states alone."""

    layer: MoeLayer

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.layer(hidden, ReplicatedTokens(Axis.single())).complete()


def make_contenders() -> dict[str, list[Block]]:
    """NUM_LAYERS layers of every contender, which share weights."""
    layers: dict[str, list[Block]] = {name: [] for name in CONTENDERS}
    for index in range(NUM_LAYERS):
        router = TopKRouter(D, RouterConfig(E, K), **OPTIONS)
        experts = make_experts("fast")
        for weight in (router.weight, experts.gate_up.data, experts.down.data):
            weight.normal_(std=0.02)
        torch_only, reference = make_experts("fast"), make_experts("torch_reference")
        torch_only._function = experts_by_group
        for twin in (torch_only, reference):
            twin.gate_up, twin.down = experts.gate_up, experts.down
        for name, ours in zip(CONTENDERS, (experts, torch_only, reference), strict=False):
            layers[name].append(OwnBlock(MoeLayer(index, router, ReplicatedDispatcher(Axis.single()), ours)))
        layers["transformers grouped_mm"].append(make_transformers_block(router, experts))
    return layers


def make_experts(backend: str) -> Experts:
    return Experts(E, D, I, Axis.single(), split="ep", backend=backend, **OPTIONS)


def make_transformers_block(router: TopKRouter, experts: Experts) -> Block:
    config = Qwen3MoeConfig(hidden_size=D, moe_intermediate_size=I, num_experts=E, num_experts_per_tok=K)
    config.norm_topk_prob = True
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        block = Qwen3MoeSparseMoeBlock(config)
    block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj = (
        router.weight,
        experts.gate_up.data,
        experts.down.data,
    )
    return lambda hidden: block(hidden[None])[0]


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure_yardsticks() -> Yardsticks:
    """Best of several, as limits are."""
    long = torch.ones(64 << 20)
    square = torch.ones(2048, 2048, dtype=torch.bfloat16)
    read_s = min(timed(long.sum) for _ in range(10))
    product_s = min(timed(lambda: square @ square) for _ in range(10))
    return Yardsticks(long.numel() * long.element_size() / read_s, 2 * 2048**3 / product_s)


def measure(layers: dict[str, list[Block]], num_tokens: int, rounds: int) -> tuple[dict[str, float], float]:
    """Median seconds of each contender, and the mean number of experts that a call touches."""
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    touched = []
    layer_of_round = cycle(range(NUM_LAYERS))
    for number in range(rounds + 1):
        for name in CONTENDERS:
            index = next(layer_of_round)
            hidden = torch.randn(num_tokens, D).bfloat16()
            block = layers[name][index]
            elapsed = timed(lambda block=block, hidden=hidden: block(hidden))  # type: ignore[misc]
            # The first round fills torch's own caches.
            if number:
                times[name].append(elapsed)
        touched.append(len(layers["fast"][index].layer.router(hidden).ids.unique()))  # type: ignore[attr-defined]
    return {name: statistics.median(values) for name, values in times.items()}, statistics.mean(touched)


def check_agreement(layers: dict[str, list[Block]]) -> None:
    """A speed without the same result is none."""
    hidden = torch.randn(64, D).bfloat16()
    expected = layers["torch_reference"][0](hidden)
    for name in CONTENDERS:
        difference = (layers[name][0](hidden) - expected).abs().max() / expected.abs().max()
        assert difference < 0.02, f"{name} differs from the reference by {difference:.3f}"


def make_table(layers: dict[str, list[Block]], yardsticks: Yardsticks, rounds: int) -> Table:
    table = Table(box=box.MARKDOWN)
    for heading in ("T", "contender", "median ms", "transformers / this", "rate", "of the yardstick"):
        table.add_column(heading, justify="left" if heading == "contender" else "right")
    for num_tokens in NUM_TOKENS:
        medians, touched = measure(layers, num_tokens, rounds if num_tokens < MANY_TOKENS else max(3, rounds // 3))
        for name in CONTENDERS:
            seconds = medians[name]
            if num_tokens < MANY_TOKENS:
                rate = touched * EXPERT_BYTES / seconds
                shown, share = f"{rate / 1e9:.1f} GB/s", rate / yardsticks.read_bytes_per_s
            else:
                rate = num_tokens * K * FLOPS_PER_PAIR / seconds
                shown, share = f"{rate / 1e9:.0f} GFLOP/s", rate / yardsticks.flops_per_s
            ratio = medians["transformers grouped_mm"] / seconds
            table.add_row(str(num_tokens), name, f"{seconds * 1e3:.2f}", f"{ratio:.2f}", shown, f"{share:.0%}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Time one MoE layer on a CPU.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write", action="store_true", help="keep the result in bench/results/experts.md")
    options = parser.parse_args()
    torch.manual_seed(0)
    layers = make_contenders()
    check_agreement(layers)
    before = measure_yardsticks()
    table = make_table(layers, before, options.rounds)
    after = measure_yardsticks()
    text = StringIO()
    Console(file=text, width=120).print(table)
    report = f"""# One MoE layer: {E} experts, top-{K}, hidden {D}, intermediate {I}, bfloat16

{describe()}, {torch.get_num_threads()} threads. Medians of interleaved rounds; a call finds no weights in a cache.
Yardsticks of the run, before and after: reading a long tensor with torch {before.read_bytes_per_s / 1e9:.1f} and
{after.read_bytes_per_s / 1e9:.1f} GB/s, torch's bfloat16 product of 2048 x 2048 matrices {before.flops_per_s / 1e9:.0f} and
{after.flops_per_s / 1e9:.0f} GFLOP/s. The kernel uses neither, so it may pass them.
{text.getvalue().rstrip()}

Made by `python bench/experts.py --write`.
"""
    Console(width=120).print(report, markup=False, highlight=False)
    if options.write:
        write_result("experts.md", report)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
