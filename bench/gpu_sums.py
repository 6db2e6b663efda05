"""Collectives of hidden states, ours beside torch's, in one run: microseconds of one among many in a CUDA graph.

    python -m torch.distributed.run --nproc-per-node 2 bench/gpu_sums.py [--device cpu]

A row has 2,048 bfloat16 values. "sum, norm" is the sum with the residual add and the norm that follow; torch's has them in
a kernel of their own.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from gpu_collectives import seconds_of

from waybill.engine.models.norm_rope import select_layer_ops
from waybill.parallel.collectives import all_reduce, reduce_scatter
from waybill.parallel.mesh import Axis, ParallelMesh
from waybill.parallel.moe.dispatch import AllGatherDispatcher, SyncClock
from waybill.parallel.moe.router import RouterOutput
from waybill.parallel.partial_sum import PartialSum
from waybill.parallel.symmetric_memory import RowLayout

WIDTH, TOP_K, NUM_EXPERTS, EPS = 2048, 8, 128, 1e-6
ROWS = (1, 8, 64, 128, 256, 512, 2048, 8192)
MICRO = 1e6


def operations(axis: Axis, rows: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """What a layer does with `rows` rows of each rank."""
    x, residual = (torch.randn(rows, WIDTH, dtype=torch.bfloat16, device=device) for _ in range(2))
    whole = torch.randn(rows * axis.size, WIDTH, dtype=torch.bfloat16, device=device)
    weight = torch.ones(WIDTH, dtype=torch.bfloat16, device=device)
    ids = torch.randint(0, NUM_EXPERTS, (rows, TOP_K), device=device)
    routed = RouterOutput(ids, torch.rand(rows, TOP_K, device=device).bfloat16())
    dispatcher, layer_ops = AllGatherDispatcher(axis, SyncClock()), select_layer_ops(device)

    def sum_and_norm() -> object:
        total = PartialSum(x, axis)
        normed = total.add_rms_norm(residual, weight, EPS)
        return normed if normed is not None else layer_ops.add_rms_norm(total.complete(), residual, weight, EPS)

    return {
        "sum": lambda: all_reduce(x, axis),
        "sum, norm": sum_and_norm,
        "scatter": lambda: reduce_scatter(whole, axis),
        "dispatch": lambda: dispatcher.dispatch(x, routed, None),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    device = torch.device("cpu")
    if options.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=120))
    mesh = ParallelMesh.build(1, dist.get_world_size(), device)
    own = mesh.with_symmetric_memory(RowLayout(WIDTH, TOP_K, torch.bfloat16)).world
    is_first = own.rank == 0
    if is_first:
        print("| rows | operation | ours, us | torch's, us |\n| ---: | --- | ---: | ---: |", flush=True)
    with torch.inference_mode():
        for rows in ROWS:
            ways = [operations(axis, rows, device) for axis in (own, replace(own, symmetric=None))]
            for name in ways[0]:
                ours, torchs = (seconds_of(way[name], device) * MICRO for way in ways)
                if is_first:
                    print(f"| {rows:,} | {name} | {ours:.1f} | {torchs:.1f} |", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
