"""Decode and prefill of a layout, one process a GPU, started by torchrun; rank 0 prints one JSON object.

python -m torch.distributed.run --nproc-per-node 2 bench/gpu_layouts.py --moe-split tp
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import zmq
from gpu_leader import Bench
from gpu_plan import FULL, MILLI

from waybill.engine.replica import follow
from waybill.parallel.collectives import all_reduce
from waybill.parallel.mesh import Axis, ParallelMesh

NUM_IN_A_GRAPH = 96
NUM_REPLAYS = 20


def microseconds_of_an_operation(run: Callable[[], object]) -> float:
    """Inside a CUDA graph of `NUM_IN_A_GRAPH`."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(NUM_IN_A_GRAPH):
            run()
    seconds = []
    for _ in range(NUM_REPLAYS):
        torch.cuda.synchronize()
        dist.barrier()
        began = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds) / NUM_IN_A_GRAPH * 1e6


def collectives(axis: Axis, device: torch.device) -> dict[str, dict[str, float]]:
    """Microseconds by way and rows of 2,048 bfloat16 values."""
    found: dict[str, dict[str, float]] = {}
    shared = axis.symmetric
    for rows in (1, 8, 64, 256, 2048):
        x = torch.randn(rows, 2048, dtype=torch.bfloat16, device=device)
        ways = {"nccl": lambda x=x: dist.all_reduce(x, group=axis.group)}
        if shared is not None:
            ways["own"] = lambda x=x, s=shared: s.all_reduce(x)
            plain = Axis(axis.name, axis.rank, axis.size, axis.group, axis.ranks)
            for seed in range(20):
                y = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + axis.rank)).to(x)
                assert torch.equal(shared.all_reduce(y), all_reduce(y.clone(), plain)), (rows, seed)
        for way, run in ways.items():
            try:
                found.setdefault(way, {})[str(rows)] = round(microseconds_of_an_operation(run), 1)
            except RuntimeError as error:
                found.setdefault(way, {})[str(rows)] = str(error)[:80]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moe-split", choices=("ep", "tp"), default="ep")
    parser.add_argument("--collectives", action="store_true")
    parser.add_argument("--no-prefill", action="store_true")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timedelta(seconds=120))
    mesh = ParallelMesh.build(1, dist.get_world_size(), device)
    report: dict[str, object] = {"tp": mesh.tp.size, "moe_split": options.moe_split}
    if options.collectives and mesh.tp.size > 1:
        report["collectives_us"] = collectives(mesh.tp, device)
        if mesh.tp.rank == 0:
            print(json.dumps(report), flush=True)
    folder = os.environ.get("BENCH_FOLDER") or tempfile.gettempdir()
    peers = [f"ipc://{folder}/peer-{os.environ['MASTER_PORT']}-{rank}" for rank in range(1, mesh.tp.size)]
    torch.manual_seed(0)
    with torch.inference_mode():
        bench = Bench(FULL, str(folder), mesh, options.moe_split)
        if mesh.tp.rank > 0:
            runner = bench.make_runner(None)
            follow(runner, None, zmq.Context(), peers[mesh.tp.rank - 1])
            runner.drop_graphs()
        else:
            with bench.leader(capture=True, peers=peers) as leader:
                for batch in FULL.batches:
                    seconds = statistics.median(leader.decode_seconds(batch))
                    report[f"decode {batch}"] = round(batch / seconds, 1)
                    print(f"decode {batch}: {seconds * MILLI:.2f} ms, {batch / seconds:.0f} tokens/s", flush=True)
                if options.profile:
                    profile(leader)
                for num_tokens in () if options.no_prefill else FULL.prefills:
                    leader.prefill_seconds(num_tokens)
                    alone = statistics.median(leader.prefill_seconds(num_tokens) for _ in range(7))
                    behind = statistics.median(leader.sustained_prefill_seconds(num_tokens, 12) for _ in range(3))
                    report[f"prefill {num_tokens}"] = [round(num_tokens / alone), round(num_tokens / behind)]
            print(json.dumps(report), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def profile(leader) -> None:
    """Kernels of some decode steps, by time."""
    for batch in (1, 64):
        leader.start_decoding(batch)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
            for _ in range(10):
                leader.scheduler.step()
            torch.cuda.synchronize()
        leader.drain()
        rows = sorted(found.key_averages(), key=lambda row: -row.device_time_total)[:14]
        for row in rows:
            print(f"{batch}: {row.device_time_total / 10:9.1f} us {row.count / 10:6.1f} x {row.key[:90]}", flush=True)


if __name__ == "__main__":
    main()
