"""Twin of `choose_tokens_numpy` in gumbel.py: a kernel that reads the logits once, in their dtype, and makes the noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from ...parallel.host_to_device import to_device
from ...parallel.triton_launch import Kernel, ceil_div, launch_options, start_next, wait_for_previous
from ..plan import Draw
from .gumbel import STREAM, TOKENS_A_BLOCK, TokenChoice

# Blocks of the generator that a program makes.
BLOCKS = 256
NUM_ROUNDS = 10


@triton.jit
def _philox(c0, c1, c2, c3, key, ROUNDS: tl.constexpr):
    """Philox-4x64 (Salmon et al. 2011) of counters and a key whose second word is 0, all uint64."""
    k0 = key
    k1 = tl.zeros_like(key)
    for _ in tl.static_range(ROUNDS):
        high0, low0 = tl.umulhi(c0, tl.full(c0.shape, 0xD2E7470EE14C6C93, tl.uint64)), c0 * 0xD2E7470EE14C6C93
        high1, low1 = tl.umulhi(c2, tl.full(c2.shape, 0xCA5A826395121157, tl.uint64)), c2 * 0xCA5A826395121157
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + 0x9E3779B97F4A7C15
        k1 = k1 + 0xBB67AE8584CAA73B
    return c0, c1, c2, c3


@triton.jit
def _gumbel(bits):
    """Of 32 random bits. Near zero, where the largest noise comes from, the logarithm of the device is too coarse."""
    uniform = tl.minimum((bits.to(tl.float32) + 0.5) * (1.0 / 4294967296.0), 0.9999999403953552)
    series = uniform * (1.0 + uniform * (0.5 + uniform * (1.0 / 3.0 + uniform * 0.25)))
    exponential = tl.where(uniform < 0.01, series, -tl.log(1.0 - uniform))
    return -tl.log(exponential)


@Kernel
@triton.jit
def _choose_kernel(
    logits, draws, scores, token_ids, first, num_columns, stride, BLOCKS: tl.constexpr, TOKENS: tl.constexpr,
    ROUNDS: tl.constexpr, STREAM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    start_next(PDL)
    wait_for_previous(PDL)
    part, row = tl.program_id(0), tl.program_id(1)
    blocks = first // TOKENS + part * BLOCKS + tl.arange(0, BLOCKS)
    tokens = blocks[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
    columns = tokens - first
    inside = (columns >= 0) & (columns < num_columns)
    value = tl.load(logits + row.to(tl.int64) * stride + columns, inside, other=float("-inf")).to(tl.float32)
    is_bad = tl.max(((value != value) | (value == float("inf"))).to(tl.int32))
    temperature = tl.load(draws + 3 * row).to(tl.float64, bitcast=True).to(tl.float32)
    if temperature > 0:
        key = tl.load(draws + 3 * row + 1).to(tl.uint64, bitcast=True)
        position = tl.load(draws + 3 * row + 2).to(tl.uint64, bitcast=True)
        counter = (blocks + 1).to(tl.uint64)
        zeros = tl.zeros_like(counter)
        w0, w1, w2, w3 = _philox(counter, zeros + position, zeros + STREAM, zeros, zeros + key, ROUNDS)
        which = tl.arange(0, TOKENS)[None, :]
        word = tl.where(
            which < 4,
            tl.where(which < 2, w0[:, None], w1[:, None]),
            tl.where(which < 6, w2[:, None], w3[:, None]),
        )
        bits = (word >> ((which % 2) * 32).to(tl.uint64)) & 0xFFFFFFFF
        scaled = tl.minimum(tl.maximum(value / temperature, -3.4028234663852886e38), 3.4028234663852886e38)
        value = tl.where(value > float("-inf"), scaled, float("-inf")) + _gumbel(bits)
    best = tl.max(value)
    token = tl.min(tl.where((value == best) & inside, tokens, 0x7FFFFFFF))
    place = row * tl.num_programs(0) + part
    tl.store(scores + place, tl.where(is_bad > 0, float("nan"), best))
    tl.store(token_ids + place, token.to(tl.int64))


def choose_tokens_triton(logits: torch.Tensor, first: int, draws: Sequence[Draw]) -> TokenChoice:
    """See `ChooseTokens`."""
    (num_rows, num_columns), device = logits.shape, logits.device
    packed = np.empty((num_rows, 3), dtype=np.int64)
    packed[:, 0] = np.array([draw.temperature for draw in draws], dtype=np.float64).view(np.int64)
    packed[:, 1] = np.array([draw.seed for draw in draws], dtype=np.uint64).view(np.int64)
    packed[:, 2] = [draw.position for draw in draws]
    num_parts = ceil_div(first % TOKENS_A_BLOCK + num_columns, BLOCKS * TOKENS_A_BLOCK)
    scores = torch.empty(num_rows, num_parts, device=device)
    token_ids = torch.empty(num_rows, num_parts, dtype=torch.int64, device=device)
    _choose_kernel[(num_parts, num_rows)](
        logits, to_device(packed, device), scores, token_ids, first, num_columns, logits.stride(0),
        BLOCKS=BLOCKS, TOKENS=TOKENS_A_BLOCK, ROUNDS=NUM_ROUNDS, STREAM=STREAM, num_warps=4, **launch_options(device),
    )  # fmt: skip
    return TokenChoice(scores, token_ids)
