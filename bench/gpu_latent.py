"""Decode attention over latents by itself, beside the bytes of the latents that it must read."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from gpu_limits import Limits, device_seconds
from gpu_plan import MILLI, Plan, Report

from waybill.engine.attention import make_attention_backend
from waybill.engine.attention.backend import AttentionBatch, AttentionRule

# Requests and the latents of each. Between two runs others are read, so that none is in the cache.
WORKLOADS = ((1, 8192), (1, 131072), (8, 8192), (64, 2048), (64, 8192), (256, 2048))
TOY_WORKLOADS = ((1, 64), (4, 32))
HEADS = (16, 64, 128)
RANK, ROPE, KEYS, VALUES = 512, 64, 128, 128
NUM_CACHES, REPEATS = 3, 21


@dataclass(frozen=True)
class RandomHeads:
    """A `LatentProjection`: W_UK [H, N, L] and W_UV [H, V, L]."""

    keys: torch.Tensor
    values: torch.Tensor
    key_width: int = KEYS
    value_width: int = VALUES

    def expand(self, latent: torch.Tensor, heads: slice) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (torch.einsum("nl,hwl->nhw", latent, each[heads]) for each in (self.keys, self.values))
        return keys, values

    def absorb(self, query: torch.Tensor) -> torch.Tensor:
        return torch.bmm(query.transpose(0, 1), self.keys).transpose(0, 1)

    def extract(self, attended: torch.Tensor) -> torch.Tensor:
        return torch.bmm(attended.transpose(0, 1), self.values.transpose(1, 2)).transpose(0, 1)


@torch.inference_mode()
def measure_latent_decode(plan: Plan, limits: Limits, report: Report) -> None:
    """With the products that absorb queries and extract values, whose weights count as bytes, too."""
    report.add(
        "",
        "| decode over latents | heads | us | latents and weights, MB | bytes allow, us | share of the limit |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    )
    shares = []
    for batch, length in TOY_WORKLOADS if plan.device == "cpu" else WORKLOADS:
        for heads in HEADS[:1] if plan.device == "cpu" else HEADS:
            num_bytes = 2 * (batch * length * (RANK + ROPE) + heads * (KEYS + VALUES) * RANK)
            seconds, bytes_s = decode_seconds(plan.device, batch, length, heads), num_bytes / limits.bytes_per_s
            shares.append(bytes_s / seconds)
            report.add(
                f"| {batch} requests of {length} | {heads} | {seconds * MILLI**2:.1f} | {num_bytes / 1e6:.1f} "
                f"| {bytes_s * MILLI**2:.1f} | {shares[-1]:.1%} |"
            )
    report.numbers["latent_decode_share"] = statistics.median(shares)


def decode_seconds(device: str, batch: int, length: int, heads: int) -> float:
    backend = make_attention_backend("auto", torch.device(device))
    num_slots = batch * length
    # Pages of one token, as the engine has them, in random order.
    table = torch.randperm(num_slots, device=device).to(torch.int32).view(batch, length)
    attention_batch = AttentionBatch([1] * batch, [length] * batch, table, torch.arange(batch, device=device), 1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).bfloat16()

    query = normal(batch, heads, KEYS + ROPE)
    caches = [{"latent": normal(num_slots, RANK + ROPE)} for _ in range(NUM_CACHES)]
    projection = RandomHeads(normal(heads, KEYS, RANK), normal(heads, VALUES, RANK))
    plan, rule = backend.plan(attention_batch), AttentionRule((KEYS + ROPE) ** -0.5)

    def run() -> None:
        for cache in caches:
            backend.forward_latent(query, cache, plan, rule, projection)

    run()
    if device == "cpu":
        return device_seconds(run, device, 3) / NUM_CACHES
    # As the engine runs it: the host is not in the way.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return device_seconds(graph.replay, device, REPEATS) / NUM_CACHES
