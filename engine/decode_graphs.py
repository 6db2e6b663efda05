"""CUDA graphs of decode steps: one launch instead of a thousand, whatever the requests' lengths.

A graph is captured per batch size; a step runs on the smallest one that holds it, padded with rows that read and write a
page nobody uses. Its inputs - ids, positions and pool rows - are one tensor at a fixed address; everything else it reads
(page table, last sampled ids, KV pool, capture buffer) stays where it is, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..parallel.dp_attention import ReplicatedTokens
from ..parallel.mesh import Axis
from .attention.backend import AttentionBackend
from .attention.triton_paged import DecodePlan
from .forward_batch import ForwardBatch, HostBatch, known_ids, slots_at
from .kv_cache.kv_store import KVStore
from .kv_cache.req_to_token_pool import ReqToTokenPool
from .models.qwen3_moe import Qwen3MoeForCausalLM
from .routing.capturer import RoutedExpertsCapturer

NUM_WARM_UPS = 2
# Copies of the inputs on the host: a step's must not change before its transfer is done, one step later at most.
NUM_STAGES = 4


def graph_sizes(max_running: int) -> list[int]:
    """Batch sizes to capture: fine steps where a padded row weighs most."""
    sizes = [1, 2, 4, 8, *range(16, 65, 8), *range(80, 257, 16)]
    return sorted({min(size, max_running) for size in sizes})


@dataclass(frozen=True)
class DecodeGraph:
    graph: torch.cuda.CUDAGraph
    inputs: torch.Tensor  # [3, B] int64: ids, positions, pool rows
    logits: torch.Tensor  # [B, V]


class DecodeGraphs:
    """Captured on construction; `run` replays."""

    def __init__(
        self,
        model: Qwen3MoeForCausalLM,
        attention: AttentionBackend[Any],
        kv_store: KVStore,
        pool: ReqToTokenPool,
        page_size: int,
        last_token_ids: torch.Tensor,
        axis: Axis,
        capturer: RoutedExpertsCapturer | None,
    ) -> None:
        self._model = model
        self._attention = attention
        self._kv_store = kv_store
        self._pool = pool
        self._page_size = page_size
        self._last_token_ids = last_token_ids
        self._axis = axis
        self._capturer = capturer
        sizes = graph_sizes(pool.scratch_row)
        self._stages = torch.empty(NUM_STAGES, 3 * sizes[-1], dtype=torch.int64).pin_memory()
        self._stage = 0
        memory = torch.cuda.graph_pool_handle()
        # The largest first: the others fit into its memory.
        self._graphs = {size: self._capture(size, memory) for size in reversed(sizes)}
        self._sizes = sizes

    @torch.inference_mode()
    def _capture(self, size: int, memory: Any) -> DecodeGraph:
        inputs = torch.zeros(3, size, dtype=torch.int64, device=self._last_token_ids.device)
        inputs[2] = self._pool.scratch_row
        for _ in range(NUM_WARM_UPS):
            self._forward(inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory):
            logits = self._forward(inputs)
        return DecodeGraph(graph, inputs, logits)

    def _forward(self, inputs: torch.Tensor) -> torch.Tensor:
        ids, positions, rows = inputs
        if self._capturer is not None:
            self._capturer.begin_graph(inputs.shape[1])
        plan = DecodePlan(self._pool.page_table, rows, (positions + 1).to(torch.int32), self._page_size)
        batch: ForwardBatch[DecodePlan] = ForwardBatch(
            input_ids=known_ids(ids, rows, self._last_token_ids),
            positions=positions,
            kv_slots=slots_at(self._pool.page_table, rows, positions, self._page_size),
            attention_plan=plan,
            layout=ReplicatedTokens(inputs.shape[1], self._axis),
            sample_rows=rows,
            sampling_req_rows=rows,
        )
        hidden = self._model(batch, self._attention, self._kv_store, self._capturer)
        if self._capturer is not None:
            self._capturer.check()
        logits = self._model.compute_logits(hidden)
        assert logits is not None, "graphs serve one rank"
        return logits

    def size_for(self, host: HostBatch) -> int | None:
        """The batch size to run a step at; None if it is no decode, or too large."""
        if not host.is_decode:
            return None
        return next((size for size in self._sizes if size >= len(host.req_rows)), None)

    def run(self, host: HostBatch, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Replay: logits [B, V], valid until the next replay, and the requests' pool rows [B] on the device."""
        graph = self._graphs[size]
        num_reqs = len(host.req_rows)
        stage = self._stages[self._stage][: 3 * size].view(3, size)
        self._stage = (self._stage + 1) % NUM_STAGES
        values = stage.numpy()
        values[:, num_reqs:] = np.array([[0], [0], [self._pool.scratch_row]])
        values[:, :num_reqs] = host.input_ids, host.positions, host.req_rows
        graph.inputs.copy_(stage, non_blocking=True)
        graph.graph.replay()
        return graph.logits[:num_reqs], graph.inputs[2, :num_reqs]
