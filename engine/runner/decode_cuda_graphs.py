"""CUDA graphs of decode steps: one launch instead of a thousand, whatever the requests' lengths.

A graph is captured per number of rows that a rank holds between the layers - the batch size, unless data-parallel attention
spreads a batch over tp ranks; a step runs on the smallest one that holds it, padded with rows that read and write a page
nobody uses. Its inputs - ids, positions, pool rows, and the positions that rows turn by behind images - are one tensor at a
fixed address; everything else it reads (page table, last sampled ids, KV pool, capture buffer) stays where it is, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .graph_parts import NUM_WARM_UPS, GraphParts
from .step_tensors import HostBatch, write_graph_inputs

# Copies of the inputs on the host: a step's must not change before its transfer is done, one step later at most.
NUM_STAGES = 4


def capture_sizes(max_rows: int) -> tuple[int, ...]:
    """Rows to capture: fine steps where a padded one weighs most."""
    sizes = [1, 2, 4, 8, *range(16, 65, 8), *range(80, 257, 16)]
    return tuple(sorted({min(size, max_rows) for size in sizes}))


@dataclass(frozen=True)
class DecodeGraph:
    graph: torch.cuda.CUDAGraph
    inputs: torch.Tensor  # [3 or 4, T] int64, see `write_graph_inputs`
    logits: torch.Tensor  # [T, V / n], this rank's columns


class DecodeGraphs:
    """Captured on construction, one for each of `sizes`; `run` replays."""

    def __init__(self, parts: GraphParts, sizes: Sequence[int]) -> None:
        self._parts = parts
        num_values = parts.num_inputs * parts.num_tokens(sizes[-1])
        self._stages = torch.empty(NUM_STAGES, num_values, dtype=torch.int64).pin_memory()
        self._stage = 0
        memory = torch.cuda.graph_pool_handle()
        # The largest first: the others fit into its memory.
        self._graphs = {size: self._capture(size, memory) for size in reversed(sizes)}

    @torch.inference_mode()
    def _capture(self, size: int, memory: Any) -> DecodeGraph:
        inputs = self._parts.new_inputs(self._parts.num_tokens(size))
        for _ in range(NUM_WARM_UPS):
            self._forward(inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads, NCCL's watchdog say, may call the driver meanwhile.
        with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
            logits = self._forward(inputs)
        return DecodeGraph(graph, inputs, logits)

    def _forward(self, inputs: torch.Tensor) -> torch.Tensor:
        parts = self._parts
        tokens = parts.read(inputs)
        plan = parts.attention.plan_graph(parts.pool.page_table, inputs[2], tokens.kv_lens, parts.page_size)
        return parts.model.compute_logits(parts.forward(inputs, tokens, parts.attention, plan))

    def run(self, host: HostBatch, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Replay: this rank's columns of the logits [B, V / n], valid until the next replay, and the requests' pool rows
        [B] on the device."""
        graph = self._graphs[size]
        num_reqs = len(host.req_rows)
        stage = self._stages[self._stage][: graph.inputs.numel()].view(graph.inputs.shape)
        self._stage = (self._stage + 1) % NUM_STAGES
        write_graph_inputs(stage.numpy(), host, host.req_rows, self._parts.pool.scratch_row)
        graph.inputs.copy_(stage, non_blocking=True)
        graph.graph.replay()
        return graph.logits[:num_reqs], graph.inputs[2, :num_reqs]
