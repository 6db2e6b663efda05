"""CUDA graphs of steps with prefills: everything but attention, which depends on the requests' lengths.

A forward pass is recorded as a chain of graphs that break where attention is called: what comes before it in the first
layer, from behind it in one layer to before it in the next, and what follows the last. A step replays the chain and runs
its own attention in between, so that the host launches a handful of kernels a layer and is ahead of the device from the
first layer on. Steps are padded to a few sizes; beyond the largest the device takes so long that the host need not hurry.
Steps with tokens of images run without: what takes the place of their embeddings is no input of a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...parallel.host_to_device import copy_to, to_device
from ..attention.backend import AttentionBackend, AttentionBatch, AttentionRule, CachedTensors, LatentProjection
from .graph_parts import NUM_WARM_UPS, GraphParts
from .step_tensors import Forwarded, HostBatch, write_graph_inputs

# The last one has room for a chunk of 2,048 tokens and as many decodes as there are graphs of decodes for.
SIZES = (64, 128, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2304)


def capture_sizes(max_rows: int) -> tuple[int, ...]:
    """Rows of a rank between the layers to capture; no step has more than `max_rows`."""
    return tuple(sorted({min(size, max_rows) for size in SIZES}))


@dataclass(frozen=True)
class Piece:
    """A graph, and the attention that follows it: query [T, H, d], what one layer has cached, and what else attention was
    called with; `projection` where the cache holds latents."""

    graph: torch.cuda.CUDAGraph
    query: torch.Tensor
    kv: CachedTensors
    rule: AttentionRule
    projection: LatentProjection | None

    def attend(self, attention: AttentionBackend[Any], plan: Any, num_tokens: int) -> torch.Tensor:
        """What attention gives for the first rows of the query."""
        query = self.query[:num_tokens]
        if self.projection is None:
            return attention.forward(query, self.kv, plan, self.rule)
        return attention.forward_latent(query, self.kv, plan, self.rule, self.projection)


@dataclass(frozen=True)
class PrefillGraph:
    """The chain for steps of up to T tokens."""

    inputs: torch.Tensor  # [3 or 4, T] int64, see `write_graph_inputs`
    pieces: list[Piece]
    last: torch.cuda.CUDAGraph
    attended: torch.Tensor  # [T, H, d], what every layer's attention gives
    hidden: torch.Tensor  # [T, D]


class GraphBreaker:
    """Stands in for attention while a chain is recorded: ends one graph and begins the next."""

    def __init__(self, attended: torch.Tensor, memory: Any) -> None:
        self._attended = attended
        self._memory = memory
        self._graph: torch.cuda.CUDAGraph | None = None
        self.pieces: list[Piece] = []

    def begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # Other threads, NCCL's watchdog say, may call the driver meanwhile.
        self._graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")

    def end(self) -> torch.cuda.CUDAGraph:
        assert self._graph is not None
        self._graph.capture_end()
        return self._graph

    def plan(self, batch: AttentionBatch) -> None:
        """Lengths are not known."""

    def forward(self, query: torch.Tensor, kv: CachedTensors, plan: None, rule: AttentionRule) -> torch.Tensor:
        return self._break(query, kv, rule, None)

    def forward_latent(
        self, query: torch.Tensor, kv: CachedTensors, plan: None, rule: AttentionRule, projection: LatentProjection
    ) -> torch.Tensor:
        return self._break(query, kv, rule, projection)

    def _break(
        self, query: torch.Tensor, kv: CachedTensors, rule: AttentionRule, projection: LatentProjection | None
    ) -> torch.Tensor:
        if self._graph is not None:
            graph = self.end()
            self.pieces.append(Piece(graph, alias(query), kv, rule, projection))
            self.begin()
        return self._attended


class PrefillGraphs:
    """Captured on construction, one for each of `sizes`; `run` replays."""

    def __init__(self, parts: GraphParts, sizes: Sequence[int]) -> None:
        self._parts = parts
        memory, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        # The largest first: the others fit into its memory.
        self._graphs = {size: self._capture(size, memory, stream) for size in reversed(sizes)}
        # What the warm-ups left on a stream that nobody uses again.
        torch.cuda.empty_cache()

    @torch.inference_mode()
    def _capture(self, size: int, memory: Any, stream: torch.cuda.Stream) -> PrefillGraph:
        parts, num_tokens = self._parts, self._parts.num_tokens(size)
        inputs = parts.new_inputs(num_tokens)
        shape = (num_tokens, *parts.model.attention_shape)
        attended = torch.zeros(shape, dtype=parts.model.config.dtype, device=parts.device)
        breaker = GraphBreaker(attended, memory)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(NUM_WARM_UPS):
                parts.forward(inputs, parts.read(inputs), breaker, None)
            torch.cuda.synchronize()
            breaker.begin()
            hidden = parts.forward(inputs, parts.read(inputs), breaker, None)
            last = breaker.end()
        return PrefillGraph(inputs, breaker.pieces, last, attended, hidden)

    def run(self, host: HostBatch, size: int) -> Forwarded:
        """Replay, with the step's own attention."""
        parts, graph, num_tokens = self._parts, self._graphs[size], len(host.input_ids)
        values = np.empty(graph.inputs.shape, dtype=np.int64)
        write_graph_inputs(values, host, np.repeat(host.req_rows, host.q_lens), parts.pool.scratch_row)
        copy_to(graph.inputs, values)
        # The device begins while the host plans.
        graph.pieces[0].graph.replay()
        if num_tokens == 0:
            return self._go_on_idle(graph)
        arrays = [host.req_rows, np.cumsum(host.q_lens)[host.sampling] - 1, host.req_rows[host.sampling]]
        packed = to_device(np.concatenate(arrays), graph.inputs.device)
        req_rows, sample_rows, sampling_req_rows = packed.split([len(part) for part in arrays])
        plan = parts.attention.plan(
            AttentionBatch(host.q_lens, host.kv_lens, parts.pool.page_table, req_rows, parts.page_size)
        )
        attended = graph.attended[:num_tokens]
        following = [piece.graph for piece in graph.pieces[1:]] + [graph.last]
        for piece, after in zip(graph.pieces, following, strict=True):
            attended.copy_(piece.attend(parts.attention, plan, num_tokens))
            after.replay()
        return Forwarded(graph.hidden[:num_tokens], sample_rows, sampling_req_rows)

    @staticmethod
    def _go_on_idle(graph: PrefillGraph) -> Forwarded:
        """Behind the first piece, on a dp rank without tokens, which is here for its experts alone."""
        for piece in graph.pieces[1:]:
            piece.graph.replay()
        graph.last.replay()
        nothing = torch.empty(0, dtype=torch.int64, device=graph.inputs.device)
        return Forwarded(graph.hidden[:0], nothing, nothing)


@dataclass(frozen=True)
class Memory:
    """A stretch of device memory, as torch takes it from other libraries."""

    __cuda_array_interface__: dict[str, Any]


def alias(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory without a hold on it: what is recorded later may use it again."""
    memory = Memory({"shape": (tensor.nbytes,), "typestr": "|u1", "data": (tensor.data_ptr(), False), "version": 3})
    return torch.as_tensor(memory, device=tensor.device).view(tensor.dtype).view(tensor.shape)
