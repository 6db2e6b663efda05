"""What the device does at best, and what a workload must at least do: together the limit that a speed is a share of."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gpu_plan import MILLI, NUM_WARM_UPS, Plan

from waybill.parallel.fp8 import BLOCK

SCALE_BYTES = 4


@dataclass(frozen=True)
class Limits:
    """What the device does at best in this run."""

    bytes_per_s: float
    flops_per_s: float
    # Of matrices in e4m3; as the other where none are.
    fp8_flops_per_s: float


def device_seconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """Median seconds of `run` on the device."""
    seconds = []
    for _ in range(repeats):
        if device == "cuda":
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            run()
            ended.record()
            ended.synchronize()
            seconds.append(began.elapsed_time(ended) / MILLI)
        else:
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure_limits(plan: Plan) -> Limits:
    num_bytes, side = (4 << 30, 8192) if plan.device == "cuda" else (64 << 20, 512)
    source = torch.empty(num_bytes, dtype=torch.uint8, device=plan.device)
    target = torch.empty_like(source)
    copy_s = device_seconds(lambda: target.copy_(source), plan.device, 9)
    left, right = (torch.randn(side, side, device=plan.device).bfloat16() for _ in range(2))
    product_s = device_seconds(lambda: left @ right, plan.device, 15)
    flops_per_s = 2 * side**3 / product_s
    if not plan.is_fp8 or plan.device == "cpu":
        return Limits(2 * num_bytes / copy_s, flops_per_s, flops_per_s)
    left, right = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn).t()
    one = torch.ones((), device=plan.device)

    def multiply() -> torch.Tensor:
        return torch._scaled_mm(left, right, one, one, out_dtype=torch.bfloat16)

    fp8_s = device_seconds(multiply, plan.device, 15)
    return Limits(2 * num_bytes / copy_s, flops_per_s, 2 * side**3 / fp8_s)


def touched_experts(routes: np.ndarray) -> float:
    """Experts that a layer of one step reads, on average: routes [steps, tokens, layers, K]."""
    return statistics.mean(len(np.unique(step[:, layer])) for step in routes for layer in range(routes.shape[2]))


def cached_width(shape: dict[str, Any]) -> int:
    """Numbers that a layer keeps of a token."""
    if "kv_lora_rank" in shape:
        return int(shape["kv_lora_rank"] + shape["qk_rope_head_dim"])
    return int(2 * shape["num_key_value_heads"] * shape["head_dim"])


def num_experts(shape: dict[str, Any]) -> int:
    return int(shape["n_routed_experts"] if "n_routed_experts" in shape else shape["num_experts"])


def decode_bytes(plan: Plan, experts: float, batch: int) -> float:
    """Bytes that a decode step must read: dense weights, `experts` a layer, keys and values, or latents."""
    shape = plan.shape
    head = shape["vocab_size"] * shape["hidden_size"]
    return layer_bytes(shape, experts, is_fp8=plan.is_fp8) + 2 * head + cached_bytes(plan, batch)


def cached_bytes(plan: Plan, batch: int) -> float:
    """Of the keys and values, or latents, that a decode step of `batch` requests reads."""
    num_tokens = batch * (plan.context + NUM_WARM_UPS + plan.num_steps / 2)
    return float(2 * plan.shape["num_hidden_layers"] * cached_width(plan.shape) * num_tokens)


def layer_bytes(shape: dict[str, Any], experts: float, *, is_fp8: bool = False) -> float:
    """Bytes of all layers' weights, `experts` of them in each that routes. Routers are in 16 bits in any case."""
    matrices = layer_weights(shape, experts)
    if not is_fp8:
        return 2 * matrices
    routers = (shape["num_hidden_layers"] - shape.get("first_k_dense_replace", 0)) * shape["hidden_size"]
    routers *= num_experts(shape)
    return (matrices - routers) * (1 + SCALE_BYTES / BLOCK**2) + 2 * routers


def layer_weights(shape: dict[str, Any], experts: float) -> float:
    """Numbers of all layers' matrices, `experts` of them in each that routes."""
    expert = 3 * shape["hidden_size"] * shape["moe_intermediate_size"]
    layers, dense = shape["num_hidden_layers"], shape.get("first_k_dense_replace", 0)
    routing = shape["hidden_size"] * num_experts(shape) + (shape.get("n_shared_experts", 0) + experts) * expert
    mlp = 3 * shape["hidden_size"] * shape["intermediate_size"] if dense else 0
    return layers * attention_weights(shape) + (layers - dense) * routing + dense * mlp


def attention_weights(shape: dict[str, Any]) -> int:
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    if "kv_lora_rank" not in shape:
        return int(2 * hidden * (heads + shape["num_key_value_heads"]) * shape["head_dim"])
    rank, q_rank, values = shape["kv_lora_rank"], shape["q_lora_rank"], shape["v_head_dim"]
    q_width = heads * (shape["qk_nope_head_dim"] + shape["qk_rope_head_dim"])
    queries = hidden * q_width if q_rank is None else q_rank * (hidden + q_width)
    expanded = rank * heads * (shape["qk_nope_head_dim"] + values)
    return int(queries + hidden * cached_width(shape) + expanded + heads * values * hidden)


def prefill_flops(shape: dict[str, Any], num_tokens: int) -> float:
    return matrix_flops(shape, num_tokens) + score_flops(shape, num_tokens)


def matrix_flops(shape: dict[str, Any], num_tokens: int) -> float:
    return float(num_tokens * 2 * layer_weights(shape, shape["num_experts_per_tok"]))


def score_flops(shape: dict[str, Any], num_tokens: int) -> float:
    # Causal: half of the score matrix, two products.
    if "kv_lora_rank" in shape:
        widths = shape["qk_nope_head_dim"] + shape["qk_rope_head_dim"] + shape["v_head_dim"]
    else:
        widths = 2 * shape["head_dim"]
    scores = 2 * shape["num_attention_heads"] * widths * num_tokens / 2
    return float(num_tokens * shape["num_hidden_layers"] * scores)


def prefill_s(shape: dict[str, Any], num_tokens: int, limits: Limits) -> float:
    """Seconds that the operations of a prefill take at the matrix rates."""
    matrices = matrix_flops(shape, num_tokens) / limits.fp8_flops_per_s
    return matrices + score_flops(shape, num_tokens) / limits.flops_per_s


@dataclass(frozen=True)
class Share:
    """What one rank of a layout does of a step, in parts of the whole model's work."""

    dp: int
    tp: int
    moe_split: str

    def touched(self, routes: np.ndarray, num_experts: int) -> float:
        """Experts that a layer reads on the rank that reads most; with sliced experts all read the same."""
        if self.moe_split == "tp":
            return touched_experts(routes)
        owner = routes // (num_experts // self.world)
        # Those of others count as one more expert, which is taken off where there are some.
        on_ranks = [np.where(owner == rank, routes.astype(np.int64), -1) for rank in range(self.world)]
        return max(touched_experts(own) - float((own < 0).any()) for own in on_ranks)

    def imbalance(self, routes: np.ndarray, num_experts: int) -> float:
        """Choices that fall on the busiest rank over the mean of all ranks, averaged over steps and layers; 1 where every
        rank has a slice of every expert."""
        if self.moe_split == "tp" or self.world == 1:
            return 1.0
        owner = routes.astype(np.int64) // (num_experts // self.world)
        on_ranks = np.stack([(owner == rank).sum(axis=(1, 3)) for rank in range(self.world)])
        return float((on_ranks.max(axis=0) / on_ranks.mean(axis=0)).mean())

    @property
    def world(self) -> int:
        return self.dp * self.tp

    def kv_part(self, shape: dict[str, Any]) -> float:
        """Of a dp rank's keys and values: of a head that several ranks have queries for each of them has its own."""
        return 1 / min(self.tp, int(shape["num_key_value_heads"]))

    def layer_bytes(self, shape: dict[str, Any], experts: float) -> float:
        """As `layer_bytes` of the whole model, of one rank."""
        hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
        router = hidden * num_experts(shape)
        expert = 3 * hidden * shape["moe_intermediate_size"] / (self.world if self.moe_split == "tp" else 1)
        key_values = 2 * hidden * shape["num_key_value_heads"] * shape["head_dim"]
        attention = (attention_weights(shape) - key_values) / self.tp + key_values * self.kv_part(shape)
        return 2 * layers * (attention + router + experts * expert)

    def decode_bytes(self, plan: Plan, experts: float, batch: int) -> float:
        """As `decode_bytes`, of one rank, whose dp rank decodes `batch` requests."""
        head = 2 * plan.shape["vocab_size"] * plan.shape["hidden_size"] / self.tp
        return self.layer_bytes(plan.shape, experts) + head + cached_bytes(plan, batch) * self.kv_part(plan.shape)

    def held_bytes(self, plan: Plan) -> float:
        """What a rank has in memory all the time: weights, and the pool of keys and values."""
        shape = plan.shape
        experts = num_experts(shape) / (1 if self.moe_split == "tp" else self.world)
        vocabulary = 4 * shape["vocab_size"] * shape["hidden_size"] / self.tp
        pool = 2 * shape["num_hidden_layers"] * cached_width(shape) * plan.kv_tokens * self.kv_part(shape)
        return float(self.layer_bytes(shape, experts) + vocabulary + pool)

    def prefill_flops(self, shape: dict[str, Any], num_tokens: int) -> float:
        """Each dp rank has a prompt of its own, and the experts of all are shared out evenly."""
        return prefill_flops(shape, num_tokens) / self.tp
