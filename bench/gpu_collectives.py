"""What a layout's collectives of hidden states take by themselves in a step: the engine's own, as its layers call them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from waybill.parallel.collectives import all_gather, all_reduce, reduce_scatter
from waybill.parallel.mesh import ParallelMesh
from waybill.parallel.moe.dispatch import AllGatherDispatcher, SyncClock
from waybill.parallel.moe.router import RouterOutput

# Operations in a CUDA graph, which hides what launching them takes.
NUM_IN_A_GRAPH = 48
NUM_REPLAYS = 10


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """One call, among many in a row."""
    for _ in range(3):
        run()
    replay: Callable[[], object] = lambda: [run() for _ in range(NUM_IN_A_GRAPH)]  # noqa: E731
    if device.type == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            replay()
        # The graph goes with the last reference, before its groups are left.
        replay = graph.replay
    seconds = []
    for _ in range(NUM_REPLAYS):
        dist.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        replay()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds) / NUM_IN_A_GRAPH


def collective_seconds(mesh: ParallelMesh, shape: dict[str, Any], rows: int) -> float:
    """Of a step in which every dp rank has `rows` tokens; sums over tp after attention, experts and embedding. With several
    dp ranks the tp ranks share their rows: they gather and sum them at attention, and experts have the dispatch of tokens
    with their ids and weights, and the return."""
    hidden, layers, top_k = shape["hidden_size"], shape["num_hidden_layers"], shape["num_experts_per_tok"]
    if mesh.world.size == 1:
        return 0.0
    x = torch.randn(rows, hidden, dtype=torch.bfloat16, device=mesh.device)
    if mesh.dp.size == 1:
        return (2 * layers + 1) * seconds_of(lambda: all_reduce(x, mesh.tp), mesh.device)
    own = x[: -(-rows // mesh.tp.size)]
    ids = torch.randint(shape["num_experts"], (len(own), top_k), device=mesh.device)
    routed = RouterOutput(ids, torch.rand(len(own), top_k, device=mesh.device).bfloat16())
    partial = torch.randn(len(own) * mesh.ep.size, hidden, dtype=torch.bfloat16, device=mesh.device)
    dispatcher = AllGatherDispatcher(mesh.ep, SyncClock())

    def there_and_back() -> None:
        dispatched = dispatcher.dispatch(own, routed, None)
        dispatcher.combine(partial, dispatched).complete()
        if mesh.tp.size > 1:
            reduce_scatter(all_gather(own, mesh.tp), mesh.tp)

    embedded = seconds_of(lambda: all_reduce(x, mesh.tp), mesh.device) if mesh.tp.size > 1 else 0.0
    return layers * seconds_of(there_and_back, mesh.device) + embedded
