"""What ranks on GPUs check: all-reduces through symmetric memory against NCCL's, bit by bit, in CUDA graphs too."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from waybill.parallel.collectives import all_reduce
from waybill.parallel.mesh import Axis, ParallelMesh
from waybill.parallel.symmetric_memory import MAX_BYTES, MAX_ROWS

WIDTH = 2048
# Of one kernel, of two shots, and of NCCL.
ROWS = (1, 3, MAX_ROWS, MAX_ROWS + 1, 300, MAX_BYTES // (2 * WIDTH) + 8)
NUM_REPLAYS = 50


def check_symmetric_memory() -> None:
    """Two ranks, a sum of two terms has one rounding whatever the order."""
    device = torch.device("cuda", dist.get_rank())
    torch.cuda.set_device(device)
    axis = ParallelMesh.build(1, dist.get_world_size(), device).tp
    assert axis.symmetric is not None
    plain = replace(axis, symmetric=None)
    for dtype in (torch.bfloat16, torch.float32):
        for rows in ROWS:
            for seed in range(5):
                x = noise(rows, dtype, device, seed)
                assert torch.equal(all_reduce(x.clone(), axis), all_reduce(x.clone(), plain)), (dtype, rows)
    check_a_graph(axis, plain, device)


def noise(rows: int, dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    """Another one on every rank."""
    generator = torch.Generator().manual_seed(2 * seed + dist.get_rank())
    return torch.randn(rows, WIDTH, generator=generator).to(device, dtype)


def check_a_graph(axis: Axis, plain: Axis, device: torch.device) -> None:
    """Many sums one after another, in which a place that is used again too early would show."""
    x = noise(MAX_ROWS, torch.bfloat16, device, 0)

    def chain(over: Axis) -> torch.Tensor:
        y = x
        for step in range(9):
            y = all_reduce(y[: MAX_ROWS - 7 * step].clone(), over) * 0.5
        return y

    for _ in range(2):
        chain(axis)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found = chain(axis)
    for seed in range(NUM_REPLAYS):
        x.copy_(noise(MAX_ROWS, torch.bfloat16, device, seed))
        graph.replay()
        assert torch.equal(found, chain(plain)), seed
