"""Decode and prefill of a layout, one process a device; `gpu.py --layouts` starts it by torchrun and makes the report.

A rank is what an engine's rank is (`load_rank`, `make_scheduler`, `follow`), with random weights; each leader is driven
in its own process, and one output processor takes the records of all. Rank 0 prints a line of JSON for each result.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist
import zmq
from gpu_collectives import collective_seconds
from gpu_host_time import LaunchTimes
from gpu_layout_plan import fitting_totals, plan_of, requests_of
from gpu_leader import Leader
from gpu_limits import Limits, Share, measure_limits
from gpu_plan import FULL, TOY, Plan
from gpu_profile import profile_decode
from marked_results import say
from output_side import Surroundings

from waybill.engine.config import EngineConfig
from waybill.engine.plan import StopPeers
from waybill.engine.replica import Rank, follow, load_rank, make_runner, make_scheduler
from waybill.parallel.collectives import all_gather
from waybill.parallel.mesh import Axis, ParallelMesh

CONTEXT_LENGTH = 16384
# For the layout before it.
GO_TIMEOUT_S = 600.0
TIMEOUT_S = 120
NUM_ALONE, NUM_BEHIND = 5, 8


def engine_config(options: argparse.Namespace, plan: Plan) -> EngineConfig:
    return EngineConfig(
        model_path=options.model,
        load_format="dummy",
        device=options.device,
        dp_size=options.dp,
        tp_size=options.tp,
        moe_split=options.moe_split,
        kv_cache_tokens=plan.kv_tokens,
        context_length=CONTEXT_LENGTH,
        # Prompts that follow each other are two at a time.
        max_running_requests=max(2, *plan.batches),
        chunked_prefill_size=max(plan.prefills),
        enable_prefix_cache=False,
        enable_return_routed_experts=True,
    )


def spread_routes(rank: Rank) -> None:
    """See `Bench.spread_routes`: experts, and with them the ranks, have even work. Powers of two: nothing is lost."""
    model: Any = rank.runner.model
    model.embed_tokens.weight.data.mul_(64.0)
    for layer in model.decoder_layers():
        layer.self_attn.o_proj.weight.data.mul_(1 / 16)


@contextlib.contextmanager
def requests(leader: Leader, dp: Axis, total: int) -> Iterator[int]:
    """This dp rank's of so many. Where another has more or fewer, steps are taken as long as one rank needs them."""
    if total % dp.size:
        leader.goes_on = lambda own: bool(all_gather(torch.tensor([int(own)]), dp).any())
    yield requests_of(total, dp.rank, dp.size)
    leader.goes_on = bool


def measure_decode(leader: Leader, rank: Rank, share: Share, bytes_per_s: float, wire_s: dict[int, float]) -> None:
    plan = leader.plan
    for total, most in zip(plan.totals, plan.batches, strict=True):
        with requests(leader, rank.mesh.dp, total) as batch:
            seconds = statistics.median(leader.decode_seconds(batch))
            host_s = leader.host_s
            found = leader.routes_of(plan.context, 9, batch, total=total)
        if rank.mesh.world.rank == 0:
            routes = np.stack(found)[:, plan.context :].swapaxes(0, 1)
            experts = share.touched(routes, plan.shape["num_experts"])
            bytes_s = share.decode_bytes(plan, experts, most) / bytes_per_s
            imbalance = share.imbalance(routes, plan.shape["num_experts"])
            say("decode", batch=most, total=total, seconds=seconds, host_s=host_s, tokens_per_s=total / seconds,
                experts=experts, imbalance=imbalance, bytes_s=bytes_s, wire_s=wire_s[most],
                share=(bytes_s + wire_s[most]) / seconds)  # fmt: skip


def measure_prefill(leader: Leader, rank: Rank, share: Share, limits: Limits, wire_s: dict[int, float]) -> None:
    shape = leader.plan.shape
    for num_tokens in leader.plan.prefills:
        leader.prefill_seconds(num_tokens)
        alone = statistics.median(leader.prefill_seconds(num_tokens) for _ in range(NUM_ALONE))
        behind = statistics.median(leader.sustained_prefill_seconds(num_tokens, NUM_BEHIND) for _ in range(2))
        found = leader.routes_of(num_tokens, 1, 1)
        if rank.mesh.world.rank == 0:
            # The ranks' prompts are one step: its tokens lie side by side.
            routes = np.concatenate(found)[None]
            bytes_s = share.layer_bytes(shape, share.touched(routes, shape["num_experts"])) / limits.bytes_per_s
            flops_s = share.prefill_flops(shape, num_tokens) / limits.flops_per_s
            limit_s = max(bytes_s, flops_s) + wire_s[num_tokens]
            total = num_tokens * share.dp
            say("prefill", tokens=num_tokens, total=total, alone_s=alone, behind_s=behind, bytes_s=bytes_s,
                flops_s=flops_s, wire_s=wire_s[num_tokens], tokens_per_s=total / alone,
                behind_tokens_per_s=total / behind, share=limit_s / behind)  # fmt: skip


def measure_without_capture(leader: Leader, rank: Rank) -> None:
    """The same decodes, for the ratio."""
    for total in leader.plan.totals:
        with requests(leader, rank.mesh.dp, total) as batch:
            seconds = statistics.median(leader.decode_seconds(batch))
        if rank.mesh.world.rank == 0:
            say("decode_off", total=total, seconds=seconds)


def measure_all(leader: Leader, rank: Rank, options: argparse.Namespace, limits: Limits) -> None:
    wire_s = options.wire_s
    share = options.share
    if rank.mesh.world.rank == 0:
        say("limits", bytes_per_s=limits.bytes_per_s, flops_per_s=limits.flops_per_s)
    measure_decode(leader, rank, share, limits.bytes_per_s, wire_s)
    if not options.no_prefill:
        measure_prefill(leader, rank, share, limits, wire_s)
    wanted = () if options.no_profile else (TOY if options.toy else FULL).totals
    for total in (total for total in leader.plan.totals if total in wanted):
        with requests(leader, rank.mesh.dp, total) as batch:
            found = profile_decode(leader, batch)
        if rank.mesh.world.rank == 0:
            say("profile", total=total, **found)


def say_launches(of_ranks: list[dict[int, float]], plan: Plan, rank: int) -> None:
    """Of the slowest rank among those with most requests."""
    for total, batch in zip(plan.totals, plan.batches, strict=True) if rank == 0 else ():
        say("launch", total=total, seconds=max(found[batch] for found in of_ranks if batch in found))


def run_phase(rank: Rank, folder: str, options: argparse.Namespace, measure: Callable[[Leader, Rank], None]) -> None:
    """One part of the measurements, on all ranks; the leaders of all dp ranks make the same calls. A phase has a folder of
    sockets of its own."""
    mesh = rank.mesh
    peers = [f"ipc://{folder}/peer{mesh.dp.rank}-{tp_rank}" for tp_rank in range(1, mesh.tp.size)]
    if mesh.world.rank == 0:
        Path(folder).mkdir()
    dist.barrier()
    if rank.runner.is_leader:
        dp = mesh.dp
        surroundings = Surroundings(folder, rank.config.model_path, peers, dp_rank=dp.rank, dp_size=dp.size)
        leader = Leader(make_scheduler(rank, surroundings.endpoints), surroundings, options.plan, dp.rank, dp.size)
        measure(leader, rank)
        for peer in surroundings.endpoints.peers:
            peer.send(StopPeers())
        # They leave before the sockets go.
        time.sleep(0.5)
        surroundings.close()
    else:
        follow(rank.runner, None, zmq.Context(), peers[mesh.tp.rank - 1])  # type: ignore[arg-type]
    rank.runner.drop_graphs()


def without_capture(rank: Rank) -> Rank:
    """The same model and cache, with a runner that records no routes."""
    config = msgspec.structs.replace(rank.config, enable_return_routed_experts=False)
    model: Any = rank.runner.model
    runner = make_runner(config, rank.mesh, model, rank.runner.kv_store, rank.limits, CONTEXT_LENGTH, None)
    return dataclasses.replace(rank, config=config, runner=runner, geometry=None, ring=None)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with config and tokenizer")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--dp", type=int, default=1)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--moe-split", choices=("ep", "tp"), default="ep")
    parser.add_argument("--totals", type=int, nargs="+", help="requests of all dp ranks in decode")
    parser.add_argument("--no-prefill", action="store_true")
    parser.add_argument("--no-profile", action="store_true")
    parser.add_argument("--go-file", type=Path, help="begin when it is there")
    options = parser.parse_args()
    plan = dataclasses.replace(TOY if options.toy else FULL, device=options.device)
    options.share = Share(options.dp, options.tp, options.moe_split)
    options.plan = plan_of(plan, options.share, tuple(options.totals or plan.totals))
    return options


def leave_out_what_does_not_fit(options: argparse.Namespace, device: torch.device) -> tuple[int, ...]:
    """Numbers of requests for which the device has no memory, which the plan then lacks.

    Raises:
        SystemExit: it has none for any.
    """
    plan = options.plan
    if device.type != "cuda":
        return ()
    fitting = fitting_totals(plan, options.share, plan.totals, torch.cuda.get_device_properties(device).total_memory)
    if not fitting:
        raise SystemExit("a device has no memory for a rank's weights and the keys and values of one request")
    options.plan = plan_of(plan, options.share, fitting)
    return tuple(total for total in plan.totals if total not in fitting)


def wait_for(file: Path) -> None:
    """
    Raises:
        TimeoutError: it does not come; whoever should make it has died, say.
    """
    deadline = time.monotonic() + GO_TIMEOUT_S
    while not file.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{file} was not made within {GO_TIMEOUT_S:.0f} s")
        time.sleep(0.05)


def main() -> None:
    options = parse_options()
    if options.go_file is not None:
        wait_for(options.go_file)
    device = torch.device("cpu")
    if options.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    left_out = leave_out_what_does_not_fit(options, device)
    plan = options.plan
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT_S))
    mesh = ParallelMesh.build(options.dp, options.tp, device)
    # The first rank's folder of sockets is everybody's.
    folder = [tempfile.mkdtemp(prefix="wb-") if mesh.world.rank == 0 else None]
    dist.broadcast_object_list(folder, device=torch.device("cpu"))
    with torch.inference_mode():
        began = time.perf_counter()
        # While the memory for it is there.
        limits = measure_limits(plan)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        rank = load_rank(engine_config(options, plan), mesh)
        spread_routes(rank)
        if mesh.world.rank == 0:
            say("ready", seconds=time.perf_counter() - began, world=mesh.world.size, left_out=left_out)
        rows = [*plan.batches, *(() if options.no_prefill else plan.prefills)]
        options.wire_s = {num: collective_seconds(rank.mesh, plan.shape, num) for num in rows}
        launches = LaunchTimes(rank.runner)
        run_phase(rank, f"{folder[0]}/on", options, lambda leader, rank: measure_all(leader, rank, options, limits))
        say_launches(launches.medians_of_ranks(), plan, mesh.world.rank)
        run_phase(without_capture(rank), f"{folder[0]}/off", options, measure_without_capture)
    dist.barrier()
    if mesh.world.rank == 0:
        # Its output processor may have removed it.
        shutil.rmtree(str(folder[0]), ignore_errors=True)
        say("done")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
