"""Collectives of CPU tensors between processes of one host: through shared memory and through gloo, call by call in turn.

    python -m torch.distributed.run --nproc-per-node 2 bench/host_collectives.py [--write]

A call's time is from all ranks' arrival to the return on rank 0: the median, and what one call of a hundred exceeds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from machine import describe, write_result

from waybill.parallel.collectives import all_gather, all_reduce, reduce_scatter
from waybill.parallel.mesh import Axis, ParallelMesh

WIDTH = 2048
ROWS = (1, 8, 32, 256, 2048)
NUM_CALLS, NUM_CALLS_OF_MANY_ROWS = 400, 60
MICRO = 1e6

OPERATIONS: dict[str, Callable[[torch.Tensor, Axis], object]] = {
    "all-reduce": all_reduce,
    "reduce-scatter": reduce_scatter,
    "all-gather": all_gather,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the result in bench/results/host_collectives.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    plain = ParallelMesh.build(1, dist.get_world_size(), torch.device("cpu"))
    shared = plain.with_shared_memory(timedelta(seconds=120))
    ways = (shared.world, plain.world)
    lines = [
        "# Collectives of CPU tensors between the processes of one host",
        "",
        f"{describe()}. {dist.get_world_size()} processes of one thread each; a row has {WIDTH:,} bfloat16 values. "
        "Calls in turn, microseconds.",
        "",
        "| operation | rows | shared memory: median | p99 | gloo: median | p99 | times as fast |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    token = torch.zeros(1)
    for name, operation in OPERATIONS.items():
        for rows in ROWS:
            x = torch.randn(rows * dist.get_world_size() if name == "reduce-scatter" else rows, WIDTH).bfloat16()
            seconds: list[list[float]] = [[], []]
            for _ in range(NUM_CALLS if rows < max(ROWS) else NUM_CALLS_OF_MANY_ROWS):
                for found, axis in zip(seconds, ways, strict=True):
                    # The ranks meet.
                    all_reduce(token, shared.world)
                    began = time.perf_counter()
                    operation(x, axis)
                    found.append(time.perf_counter() - began)
            ours, gloos = (np.array(each[10:]) * MICRO for each in seconds)
            ratio = np.median(gloos) / np.median(ours)
            lines.append(
                f"| {name} | {rows:,} | {np.median(ours):.0f} | {np.percentile(ours, 99):.0f} | {np.median(gloos):.0f} "
                f"| {np.percentile(gloos, 99):.0f} | {ratio:.1f} |"
            )
    if shared.world.rank == 0:
        text = "\n".join(lines) + "\n"
        print(text)
        if options.write:
            write_result("host_collectives.md", text)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
