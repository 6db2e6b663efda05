"""Decode attention straight over the pages, in Triton: keys and values are read once, nothing is gathered or copied.

Where there are few requests, each one's keys are split over several programs (Flash-Decoding, Dao et al. 2023), whose
partial results a second kernel merges by their log-sum-exp. Lengths and pages are read on the device, so one CUDA graph
serves any length. Prefills run through `SdpaAttention`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ...parallel.host_to_device import to_device
from ...parallel.triton_launch import Kernel, launch_options, power_of_2_from, start_next, wait_for_previous
from .backend import AttentionBatch, AttentionRule, CachedTensors, LatentProjection
from .decode_plan import DecodePlan
from .latent_sdpa import prefill_latents
from .latent_triton import latent_decode_attention
from .sdpa import SdpaAttention, prefill
from .sdpa_plan import Prefill, SdpaPlan
from .split_merge_triton import choose_num_splits, merge_splits

# Rows of the matrix unit's smallest tile: the query heads of one kv head are padded to it.
MIN_TILE = 16
# Keys that a program reads at a time, and its warps and pipeline stages. Programs of whole requests are many, and hide
# latency by their number; those of parts of requests by what each has on its way.
WHOLE = {"BLOCK": 16, "num_warps": 1, "num_stages": 2}
PART = {"BLOCK": 32, "num_warps": 4, "num_stages": 3}
# Programs that keep the device busy.
WANTED_PROGRAMS = 512
MAX_SPLITS = 32


@Kernel
@triton.jit
def _decode_kernel(
    query, k_cache, v_cache, sinks, page_table, req_rows, kv_lens, out, partial, lse, scale, table_stride, window,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, PAGE_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    start_next(PDL)
    request, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # Lengths and pages are written before the step's first layer, by kernels that nothing overlaps with. They are read past
    # the first-level cache, which may hold another step's.
    length = tl.load(kv_lens + request, cache_modifier=".cg").to(tl.int32)
    table = page_table + tl.load(req_rows + request, cache_modifier=".cg") * table_stride
    begin = 0
    if WINDOW:
        begin = tl.maximum(length - window, 0)
    per_split = tl.cdiv(tl.cdiv(length - begin, BLOCK), NUM_SPLITS) * BLOCK
    first = begin + split * per_split
    end = tl.minimum(first + per_split, length)
    rows, columns = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    head = request.to(tl.int64) * NUM_KV_HEADS * GROUP + kv_head * GROUP + rows
    position = first + tl.arange(0, BLOCK)
    page = tl.load(table + position // PAGE_SIZE, position < end, other=0, cache_modifier=".cg")
    wait_for_previous(PDL)
    q = tl.load(query + head[:, None] * WIDTH + columns[None, :], rows[:, None] < GROUP, other=0.0)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(first, end, BLOCK):
        position = start + tl.arange(0, BLOCK)
        inside = position < end
        slot = (page.to(tl.int64) * PAGE_SIZE + position % PAGE_SIZE) * NUM_KV_HEADS + kv_head
        where = slot[:, None] * WIDTH + columns[None, :]
        position += BLOCK
        page = tl.load(table + position // PAGE_SIZE, position < end, other=0, cache_modifier=".cg")
        keys = tl.load(k_cache + where, inside[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=1))
        weights = tl.exp(scores - new_best[:, None])
        shrink = tl.exp(best - new_best)
        values = tl.load(v_cache + where, inside[:, None], other=0.0)
        acc = acc * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        total = total * shrink + tl.sum(weights, axis=1)
        best = new_best
    if SINKS and NUM_SPLITS == 1:
        sink = tl.load(sinks + kv_head * GROUP + rows, rows < GROUP, other=float("-inf")).to(tl.float32)
        total += tl.exp(sink - best)
    # A split without keys has weight exp(-inf) in the merge; its zeros must not be divided by its zero total.
    attended = acc / tl.where(total > 0, total, 1.0)[:, None]
    if NUM_SPLITS == 1:
        target = out + head[:, None] * WIDTH + columns[None, :]
        tl.store(target, attended.to(out.dtype.element_ty), rows[:, None] < GROUP)
    else:
        place = head * NUM_SPLITS + split
        tl.store(partial + place[:, None] * WIDTH + columns[None, :], attended, rows[:, None] < GROUP)
        tl.store(lse + place, tl.where(total > 0, best + tl.log(total), float("-inf")), rows < GROUP)


@dataclass(frozen=True)
class MixedPlan:
    """A step with prefills in it: those, and the decodes' rows of the step and their own plan."""

    prefills: list[Prefill]
    decode_rows: torch.Tensor
    decodes: DecodePlan


class TritonPagedAttention:
    """Decodes through the kernel above, or over latents that of `latent_triton.py`; prefills through `SdpaAttention`."""

    def __init__(self) -> None:
        self._prefill = SdpaAttention()

    def plan(self, batch: AttentionBatch) -> DecodePlan | MixedPlan | SdpaPlan:
        device = batch.page_table.device
        if max(batch.q_lens, default=0) <= 1:
            kv_lens = to_device(batch.kv_lens, device, torch.int32)
            return DecodePlan(batch.page_table, batch.req_rows, kv_lens, batch.page_size)
        plan = self._prefill.plan(batch)
        decodes = [i for i, q_len in enumerate(batch.q_lens) if q_len == 1]
        if not decodes:
            return plan
        kv_lens = to_device([batch.kv_lens[i] for i in decodes], device, torch.int32)
        members, rows = to_device(decodes, device), to_device([plan.firsts[i] for i in decodes], device)
        decode_plan = DecodePlan(batch.page_table, batch.req_rows[members], kv_lens, batch.page_size)
        return MixedPlan(plan.prefills, rows, decode_plan)

    def plan_graph(
        self, page_table: torch.Tensor, req_rows: torch.Tensor, kv_lens: torch.Tensor, page_size: int
    ) -> DecodePlan:
        return DecodePlan(page_table, req_rows, kv_lens, page_size)

    def forward(
        self, query: torch.Tensor, kv: CachedTensors, plan: DecodePlan | MixedPlan | SdpaPlan, rule: AttentionRule
    ) -> torch.Tensor:
        if isinstance(plan, DecodePlan):
            return decode_attention(query, kv["k"], kv["v"], plan, rule)
        if isinstance(plan, SdpaPlan):
            return self._prefill.forward(query, kv, plan, rule)
        out = torch.empty_like(query)
        out[plan.decode_rows] = decode_attention(query[plan.decode_rows], kv["k"], kv["v"], plan.decodes, rule)
        for each in plan.prefills:
            out[each.first : each.last] = prefill(query[each.first : each.last], kv, each, rule)
        return out

    def forward_latent(
        self,
        query: torch.Tensor,
        kv: CachedTensors,
        plan: DecodePlan | MixedPlan | SdpaPlan,
        rule: AttentionRule,
        projection: LatentProjection,
    ) -> torch.Tensor:
        if isinstance(plan, DecodePlan):
            return decode_latent(query, kv["latent"], plan, rule.scale, projection)
        if isinstance(plan, SdpaPlan):
            return self._prefill.forward_latent(query, kv, plan, rule, projection)
        out = query.new_empty(*query.shape[:2], projection.value_width)
        rows = query[plan.decode_rows]
        out[plan.decode_rows] = decode_latent(rows, kv["latent"], plan.decodes, rule.scale, projection)
        prefill_latents(query, kv["latent"], plan.prefills, rule.scale, projection, out)
        return out


def decode_latent(
    query: torch.Tensor, cache: torch.Tensor, plan: DecodePlan, scale: float, projection: LatentProjection
) -> torch.Tensor:
    """In the absorbed form, one query token per request: query [B, H, N + R], cache [S, L + R] -> [B, H, V]."""
    content, rope = query.tensor_split([projection.key_width], dim=-1)
    return projection.extract(latent_decode_attention(projection.absorb(content), rope, cache, plan, scale))


def decode_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: DecodePlan, rule: AttentionRule
) -> torch.Tensor:
    """One query token per request: query [B, H, d], caches [S, G, d] -> [B, H, d]."""
    (num_reqs, num_heads, width), num_kv_heads = query.shape, k_cache.shape[1]
    num_splits = choose_num_splits(num_reqs * num_kv_heads, WANTED_PROGRAMS, MAX_SPLITS)
    group = num_heads // num_kv_heads
    out = torch.empty_like(query)
    partial, lse = out, out
    sinks = out if rule.sinks is None else rule.sinks
    if num_splits > 1:
        partial = query.new_empty(num_reqs, num_heads, num_splits, width, dtype=torch.float32)
        lse = query.new_empty(num_reqs, num_heads, num_splits, dtype=torch.float32)
    _decode_kernel[(num_reqs, num_kv_heads, num_splits)](
        query, k_cache, v_cache, sinks, plan.page_table, plan.req_rows, plan.kv_lens, out, partial, lse, rule.scale,
        plan.page_table.stride(0), rule.window or 0, NUM_KV_HEADS=num_kv_heads, GROUP=group, WIDTH=width,
        PAGE_SIZE=plan.page_size, NUM_SPLITS=num_splits, ROWS=max(MIN_TILE, power_of_2_from(group)),
        WINDOW=rule.window is not None, SINKS=rule.sinks is not None, **(WHOLE if num_splits == 1 else PART),
        **launch_options(query.device),
    )  # fmt: skip
    if num_splits > 1:
        merge_splits(partial, lse, out, rule.sinks)
    return out
