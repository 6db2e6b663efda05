"""The engine on a GPU: correctness first, then speed beside the device's limits, in one report.

    python bench/gpu.py                                   one CUDA device of 80 GB, some minutes
    python bench/gpu.py --shape moonlight                 Moonlight-16B-A3B, and its attention by itself
    python bench/gpu.py --shape 30b-fp8                   in block FP8, beside bfloat16
    python bench/gpu.py --device cpu --toy                a dry run of every part at a toy size
    python bench/gpu.py --layouts --write                 two to eight CUDA devices: all layouts that they allow
    python bench/gpu.py --layouts tp1 dp2                 some of them
    python bench/gpu.py --device cpu --toy --layouts      a dry run of them all on eight ranks

Correctness: the whole engine (torchrun, processes, sockets) in float32 against `transformers` on the same device, with the
embedded model and with one of real width and random weights. Speed: the leader in this process over a model of the shape
of Qwen3-30B-A3B with random weights made on the device, bfloat16, a real output processor beside it. Every number is a
median; limits - copy bandwidth and matrix rate - are measured in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from gpu_latent import measure_latent_decode
from gpu_layout_plan import LAYOUTS
from gpu_layout_report import compare_layouts
from gpu_leader import Bench, Leader
from gpu_limits import Limits, decode_bytes, layer_bytes, measure_limits, prefill_s, touched_experts
from gpu_plan import FULL_PLANS, GREEDY, MILLI, NUM_PROMPTS, SAMPLED, TOY_PLANS, Plan, Report
from gpu_profile import profile_step
from machine import describe, write_result
from make_models import write_checkpoint

from waybill import Engine
from waybill.engine.routing.transformers_reference import Agreement, Difference, Reference
from waybill.launch.args import EMBEDDED_MODEL

# Over noise that random weights amplify, logprobs of two right float32 programs differ by this much.
LOGPROB_TOLERANCE = 1e-3
TITLES = {"30b": "Qwen3-30B-A3B", "30b-fp8": "Qwen3-30B-A3B in block FP8", "moonlight": "Moonlight-16B-A3B"}
# The last ones are those of layouts, which have `speed` and `profile`, too.
PARTS = ("correctness", "latents", "bfloat16", "speed", "capture", "profile", "routes", "stall", "processors")


def check_correctness(name: str, path: str, plan: Plan, report: Report) -> None:
    """Tokens, routes and log-probabilities of greedy generations in float32."""
    rng = np.random.default_rng(0)
    reference = Reference(path, plan.device)
    with Engine(
        path,
        tp_size=1,
        device=plan.device,
        dtype="float32",
        context_length=2048,
        kv_cache_tokens=16384,
        chunked_prefill_size=256,
        enable_return_routed_experts=True,
    ) as engine:
        lengths = rng.integers(1, 700, plan.num_prompts)
        prompts = [rng.integers(0, 250, length).tolist() for length in lengths]
        answers = engine.generate(
            input_ids=prompts,
            sampling_params={"temperature": 0.0, "max_new_tokens": 24, "ignore_eos": True},
            return_logprob=True,
            return_routed_experts=True,
        )
    agreement = Agreement()
    failures: list[str] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        meta = answer["meta_info"]
        logprobs = [value for value, _, _ in meta["output_token_logprobs"]]
        try:
            agreement += reference.check_generation(
                prompt, answer["output_ids"], logprobs, meta["routed_experts"], LOGPROB_TOLERANCE
            )
        except Difference as difference:
            failures.append(str(difference))
    verdict = "equal" if not failures else f"{len(failures)} of {len(prompts)} DIFFER: {failures[0]}"
    report.add(
        f"- {name}: {verdict}; {agreement.num_tokens} tokens and {agreement.num_rows} rows compared, near-ties forced: "
        f"{agreement.forced_routes} routes, {agreement.tied_tokens} tokens"
    )
    report.numbers[f"correct: {name}"] = not failures


def measure_speed(bench: Bench, leader: Leader, limits: Limits, report: Report) -> None:
    """Shares of the limit that binds: bytes over copy bandwidth, or operations over matrix rate."""
    report.add(
        "",
        "| workload | experts read | tokens/s | ms a step | bytes allow, ms | operations allow, ms | share of the limit |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    )
    plan = bench.plan
    for name, params in {"": GREEDY, **SAMPLED}.items():
        for batch in plan.batches:
            seconds = statistics.median(leader.decode_seconds(batch, params))
            routes = np.stack(leader.routes_of(plan.context, 9, batch, params))
            experts = touched_experts(routes[:, plan.context :].swapaxes(0, 1))
            bytes_s = decode_bytes(plan, experts, batch) / limits.bytes_per_s
            how = f" ({name})" if name else ""
            name_of_row = f"decode, {batch} at once, {plan.context} tokens of context{how}"
            row(report, name_of_row, batch, experts, seconds, bytes_s)
    measure_prefills(bench, leader, limits, "", report)
    with bench.spread_routes():
        measure_prefills(bench, leader, limits, ", routes spread", report)
    report.add(
        "",
        "In one prompt random weights route most tokens alike: attention adds the same to all, and few experts are read.",
        "With routes spread (`spread_routes` in gpu_leader.py), tokens choose independently, as after balanced training.",
    )


def seconds_in_bfloat16(plan: Plan, folder: str) -> dict[int, float]:
    """Of a decode step, by the number of requests; 0 is the prefill of one prompt. Both models have no room at once."""
    bench = Bench(dataclasses.replace(plan, is_fp8=False), folder)
    with bench.leader(capture=True) as leader:
        seconds = step_seconds(leader)
    del bench, leader
    gc.collect()
    if plan.device == "cuda":
        torch.cuda.empty_cache()
    return seconds


def step_seconds(leader: Leader) -> dict[int, float]:
    found = {batch: statistics.median(leader.decode_seconds(batch)) for batch in leader.plan.batches}
    leader.prefill_seconds(leader.prefill_tokens)
    return found | {0: statistics.median(leader.prefill_seconds(leader.prefill_tokens) for _ in range(9))}


def compare_with_bfloat16(leader: Leader, in_bfloat16: dict[int, float], report: Report) -> None:
    report.add(
        "", "| workload | bfloat16, ms a step | FP8, ms a step | times as fast |", "| --- | ---: | ---: | ---: |"
    )
    for batch, seconds in step_seconds(leader).items():
        name = f"decode, {batch} at once" if batch else f"prefill, {leader.prefill_tokens} tokens, alone"
        ratio = in_bfloat16[batch] / seconds
        report.add(f"| {name} | {in_bfloat16[batch] * MILLI:.2f} | {seconds * MILLI:.2f} | {ratio:.2f} |")
        report.numbers[f"over bfloat16: {name}"] = ratio


def measure_prefills(bench: Bench, leader: Leader, limits: Limits, how: str, report: Report) -> None:
    """One prompt in one step: alone, from its plan to its token on the host, and one behind another."""
    for num_tokens in bench.plan.prefills:
        leader.prefill_seconds(num_tokens)
        alone = statistics.median(leader.prefill_seconds(num_tokens) for _ in range(9))
        sustained = statistics.median(leader.sustained_prefill_seconds(num_tokens, NUM_PROMPTS) for _ in range(5))
        experts = touched_experts(np.stack(leader.routes_of(num_tokens, 1, 1)))
        bytes_s = layer_bytes(bench.plan.shape, experts, is_fp8=bench.plan.is_fp8) / limits.bytes_per_s
        flops_s = prefill_s(bench.plan.shape, num_tokens, limits)
        for mode, seconds in ((", alone", alone), (", one behind another", sustained)):
            row(report, f"prefill, {num_tokens} tokens{mode}{how}", num_tokens, experts, seconds, bytes_s, flops_s)


def row(
    report: Report, name: str, num_tokens: int, experts: float, seconds: float, bytes_s: float, flops_s: float = 0.0
) -> None:
    share = max(bytes_s, flops_s) / seconds
    operations, of_rate = "", ""
    if flops_s:
        operations, of_rate = f"{flops_s * MILLI:.2f}", f" ({flops_s / seconds:.1%} of the matrix rate)"
    report.add(
        f"| {name} | {experts:.0f} | {num_tokens / seconds:,.0f} | {seconds * MILLI:.2f} | {bytes_s * MILLI:.2f} "
        f"| {operations} | {share:.1%}{of_rate} |"
    )
    report.numbers[name] = {"tokens_per_s": num_tokens / seconds, "share": share, "flops_share": flops_s / seconds}


def measure_capture(bench: Bench, on: Leader, report: Report) -> None:
    """Decode steps with and without routing, in turn."""
    batch = bench.plan.batches[-2]
    with bench.leader(capture=False) as off:
        pairs = [
            (statistics.median(on.decode_seconds(batch)), statistics.median(off.decode_seconds(batch)))
            for _ in range(5)
        ]
    ratios = [with_capture / without for with_capture, without in pairs]
    report.add(
        "",
        f"Capture on / off, decode of {batch}: median {statistics.median(ratios):.4f} of {len(ratios)} alternating pairs "
        f"({min(ratios):.4f} to {max(ratios):.4f}).",
    )
    report.numbers["capture_ratio"] = statistics.median(ratios)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=tuple(FULL_PLANS), default="30b", help="of make_models.py")
    parser.add_argument("--toy", action="store_true", help="toy sizes, for a dry run")
    parser.add_argument("--skip", nargs="*", default=[], choices=PARTS)
    parser.add_argument("--write", action="store_true", help="keep the result in bench/results/gpu.md")
    parser.add_argument(
        "--layouts", nargs="*", choices=tuple(LAYOUTS), help="these, or all that fit, instead of one GPU"
    )
    parser.add_argument("--layout-timeout", type=float, default=480.0, help="seconds that one layout may take")
    parser.add_argument(
        "--kept", type=Path, help="file with results of earlier calls, to which this one adds its layouts"
    )
    parser.add_argument("--part-timeout", type=float, default=1200.0, help="seconds of each part behind the layouts")
    options = parser.parse_args()
    if options.write and (options.device == "cpu" or options.toy):
        parser.error("--write: a dry run has no results to keep")
    return options


def main() -> None:
    options = parse_options()
    if options.layouts is not None:
        compare_layouts(options.layouts or list(LAYOUTS), options)
        return
    plan = (TOY_PLANS if options.toy else FULL_PLANS)[options.shape]
    plan = dataclasses.replace(plan, device=options.device)
    report = Report()
    report.add(f"# The engine on a GPU: {TITLES[options.shape]}", "", describe() + ".", "")
    if "correctness" not in options.skip:
        with tempfile.TemporaryDirectory(prefix="waybill-") as folder:
            write_checkpoint(plan.wide_shape, Path(folder), 0)
            check_correctness("embedded model, float32", str(EMBEDDED_MODEL), plan, report)
            check_correctness("random model of real width, float32", folder, plan, report)
    limits = measure_limits(plan)
    fp8 = f", in e4m3 {limits.fp8_flops_per_s / 1e12:.0f}" if plan.is_fp8 else ""
    report.add(
        "",
        f"Limits: copy {limits.bytes_per_s / 1e12:.2f} TB/s, matrices {limits.flops_per_s / 1e12:.0f} TFLOP/s{fp8}.",
    )
    if "kv_lora_rank" in plan.shape and "latents" not in options.skip:
        measure_latent_decode(plan, limits, report)
    with torch.inference_mode(), tempfile.TemporaryDirectory(prefix="waybill-") as folder:
        in_bfloat16 = {}
        if plan.is_fp8 and "bfloat16" not in options.skip:
            in_bfloat16 = seconds_in_bfloat16(plan, folder)
        bench = Bench(plan, folder)
        with bench.leader(capture=True) as leader:
            if in_bfloat16:
                compare_with_bfloat16(leader, in_bfloat16, report)
            if "speed" not in options.skip:
                measure_speed(bench, leader, limits, report)
            if "profile" not in options.skip:
                for batch in bench.plan.batches:
                    profile_step(leader, f"decode of {batch}", batch, report)
                profile_step(leader, f"prefill of {leader.prefill_tokens}", 0, report)
                with bench.spread_routes():
                    profile_step(leader, f"prefill of {leader.prefill_tokens}, routes spread", 0, report)
                report.add(
                    "",
                    "Kernels overlap (programmatic dependent launch), and one that waits for another counts as running: "
                    "the columns sum to more than a step.",
                )
            if "capture" not in options.skip:
                measure_capture(bench, leader, report)
    print(json.dumps(report.numbers))
    if options.write:
        write_result("gpu.md" if options.shape == "30b" else f"gpu_{options.shape}.md", "\n".join(report.lines) + "\n")


if __name__ == "__main__":
    main()
