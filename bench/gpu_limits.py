"""What the device does at best, and what a workload must at least do: together the limit that a speed is a share of."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gpu_plan import CONTEXT, MILLI, NUM_STEPS, NUM_WARM_UPS, Plan


@dataclass(frozen=True)
class Limits:
    """What the device does at best in this run."""

    bytes_per_s: float
    flops_per_s: float


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
    return Limits(2 * num_bytes / copy_s, 2 * side**3 / product_s)


def decode_bytes(shape: dict[str, Any], routes: list[np.ndarray], batch: int) -> float:
    """Bytes that a decode step must read: dense weights, the experts its tokens chose, keys and values."""
    width, head_dim, heads, kv_heads = (
        shape[k] for k in ("hidden_size", "head_dim", "num_attention_heads", "num_key_value_heads")
    )
    layers = shape["num_hidden_layers"]
    attention = width * (heads + 2 * kv_heads) * head_dim + heads * head_dim * width + width * shape["num_experts"]
    dense = layers * attention + shape["vocab_size"] * width
    decoded = np.stack([rows[CONTEXT:] for rows in routes])
    unique = [len(np.unique(decoded[:, s, m])) for s in range(decoded.shape[1]) for m in range(decoded.shape[2])]
    experts = layers * statistics.mean(unique) * 3 * width * shape["moe_intermediate_size"]
    kv = layers * 2 * kv_heads * head_dim * batch * (CONTEXT + NUM_WARM_UPS + NUM_STEPS / 2)
    return 2 * (dense + experts + kv)


def prefill_flops(shape: dict[str, Any], num_tokens: int) -> float:
    width, head_dim, heads, kv_heads = (
        shape[k] for k in ("hidden_size", "head_dim", "num_attention_heads", "num_key_value_heads")
    )
    attention = width * (heads + 2 * kv_heads) * head_dim + heads * head_dim * width + width * shape["num_experts"]
    experts = shape["num_experts_per_tok"] * 3 * width * shape["moe_intermediate_size"]
    # Causal: half of the score matrix, two products.
    scores = 2 * 2 * heads * head_dim * num_tokens / 2
    return num_tokens * shape["num_hidden_layers"] * (2 * (attention + experts) + scores)


def prefill_bytes(shape: dict[str, Any]) -> float:
    """Bytes that a long prefill must read: all weights, for its tokens choose every expert between them."""
    width, layers = shape["hidden_size"], shape["num_hidden_layers"]
    heads = shape["num_attention_heads"] + shape["num_key_value_heads"]
    experts = shape["num_experts"] * 3 * width * shape["moe_intermediate_size"]
    return 2 * layers * (2 * width * heads * shape["head_dim"] + width * shape["num_experts"] + experts)
