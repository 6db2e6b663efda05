"""What ranks on GPUs check: collectives through symmetric memory against NCCL's, bit by bit, in CUDA graphs too."""

from __future__ import annotations

import torch
import torch.distributed as dist

from waybill.engine.models.norm_rope_triton import TritonLayerOps
from waybill.parallel.collectives import all_reduce, reduce_scatter
from waybill.parallel.mesh import Axis, ParallelMesh
from waybill.parallel.moe.dispatch import AllGatherDispatcher, RecordedRows, SyncClock
from waybill.parallel.moe.router import RouterOutput
from waybill.parallel.partial_sum import PartialSum
from waybill.parallel.symmetric_memory import MAX_PACKET_ROWS, RowLayout

WIDTH, TOP_K, NUM_EXPERTS = 2048, 8, 128
# Of both lanes, of NCCL, and numbers that no program's rows divide.
ROWS = (1, 3, MAX_PACKET_ROWS, MAX_PACKET_ROWS + 1, 302, 2047, 32768)
NUM_REPLAYS = 50


def check_symmetric_memory() -> None:
    """Two ranks: a sum of two terms has one rounding whatever the order."""
    device = torch.device("cuda", dist.get_rank())
    torch.cuda.set_device(device)
    plain = ParallelMesh.build(1, dist.get_world_size(), device)
    for dtype in (torch.bfloat16, torch.float32):
        axis = plain.with_symmetric_memory(RowLayout(WIDTH, TOP_K, dtype)).tp
        assert axis.symmetric is not None
        for rows in ROWS:
            for seed in range(5):
                check_sums(noise(rows, dtype, device, seed), axis, plain.tp)
                check_gathers(noise(rows, dtype, device, seed), axis, plain.tp)
        check_a_graph(noise(MAX_PACKET_ROWS, dtype, device, 0), axis, plain.tp)


def noise(rows: int, dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    """Another one on every rank."""
    generator = torch.Generator().manual_seed(2 * seed + dist.get_rank())
    return torch.randn(rows, WIDTH, generator=generator).to(device, dtype)


def check_sums(x: torch.Tensor, axis: Axis, plain: Axis) -> None:
    """All-reduce and reduce-scatter, alone and with the add and norm that follow."""
    where = (x.dtype, len(x))
    assert torch.equal(all_reduce(x.clone(), axis), all_reduce(x.clone(), plain)), where
    residual, weight = x.flip(0).contiguous(), x[0].abs().contiguous()
    check_norm(PartialSum(x, axis), all_reduce(x.clone(), plain), residual, weight)
    if len(x) % axis.size == 0:
        share = reduce_scatter(x, plain)
        assert torch.equal(reduce_scatter(x, axis), share), where
        check_norm(PartialSum(x, axis, scatter=True), share, residual[: len(share)], weight)


def check_norm(found: PartialSum, expected: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> None:
    own_residual = residual.clone()
    normed = found.add_rms_norm(own_residual, weight, 1e-6)
    assert (normed is None) == (len(found.term) == ROWS[-1])
    if normed is not None:
        wanted, total = TritonLayerOps().add_rms_norm(expected, residual.clone(), weight, 1e-6)
        assert torch.equal(own_residual, total) and torch.equal(normed, wanted), (found.term.dtype, len(found.term))


def check_gathers(hidden: torch.Tensor, axis: Axis, plain: Axis) -> None:
    """The dispatcher's rows, ids and weights, and the ids and weights that are recorded of both ranks or of one."""
    ids = (hidden[:, :TOP_K].abs() * 1000).to(torch.int64) % NUM_EXPERTS
    routed = RouterOutput(ids, hidden[:, TOP_K : 2 * TOP_K].contiguous())
    for num_padding in (0, 1):
        padding = None if num_padding == 0 else torch.arange(len(hidden), device=hidden.device) >= len(hidden) - 1
        for first, count in ((0, 2 * len(hidden)), (len(hidden), len(hidden))):
            shape, device = (count, TOP_K), hidden.device
            records = [
                RecordedRows(
                    torch.zeros(shape, dtype=torch.uint8, device=device), first, torch.zeros(shape, device=device)
                )
                for _ in range(2)
            ]
            found, expected = (
                AllGatherDispatcher(each, SyncClock()).dispatch(hidden, routed, padding, record)
                for each, record in zip((axis, plain), records, strict=True)
            )
            for name in ("hidden", "ids", "weights"):
                assert torch.equal(getattr(found, name), getattr(expected, name)), (name, len(hidden), num_padding)
            for name in ("ids", "weights"):
                assert torch.equal(*(getattr(record, name) for record in records)), (name, first, count)


def check_a_graph(x: torch.Tensor, axis: Axis, plain: Axis) -> None:
    """Many sums one after another, in which a place that is used again too early would show."""

    def chain(over: Axis) -> torch.Tensor:
        y = x
        for step in range(9):
            y = all_reduce(y[: MAX_PACKET_ROWS - 7 * step].clone(), over) * 0.5
            wide = y.repeat(40, 1)
            y = y + reduce_scatter(wide, over)[: len(y)]
        return y

    for _ in range(2):
        chain(axis)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found = chain(axis)
    for seed in range(NUM_REPLAYS):
        x.copy_(noise(len(x), x.dtype, x.device, seed))
        graph.replay()
        assert torch.equal(found, chain(plain)), seed
