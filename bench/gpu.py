"""The engine on a GPU: correctness first, then speed beside the device's limits, in one report.

    python bench/gpu.py                                   one CUDA device of 80 GB, some minutes
    python bench/gpu.py --device cpu --toy                a dry run of every part at a toy size

Correctness: the whole engine (torchrun, processes, sockets) in float32 against `transformers` on the same device, with the
embedded model and with one of real width and random weights. Speed: the leader in this process over a model of the shape
of Qwen3-30B-A3B with random weights made on the device, bfloat16, a real output processor beside it. Every number is a
median; limits - copy bandwidth and matrix rate - are measured in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from machine import describe, write_result
from make_models import write_checkpoint
from output_side import Surroundings
from transformers import Qwen3MoeConfig

from waybill import Engine
from waybill.engine.config import EngineConfig
from waybill.engine.io_struct import OutputBatch, SamplingParams, TokenizedGenerateReqInput
from waybill.engine.kv_cache.kv_store import KVStore
from waybill.engine.model_runner import ModelRunner
from waybill.engine.models.qwen3_moe import ModelContext, Qwen3MoeForCausalLM, parse_config
from waybill.engine.replica import Rank, make_scheduler
from waybill.engine.routing.capturer import RoutedExpertsCapturer
from waybill.engine.routing.reference import Agreement, Difference, Reference
from waybill.engine.routing.ring import RouteRing
from waybill.engine.schedule_policy import StepLimits
from waybill.launch.args import EMBEDDED_MODEL
from waybill.parallel.mesh import Axis, ParallelMesh

SHAPE_30B: dict[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}
CONTEXT = 512
NUM_WARM_UPS, NUM_STEPS = 8, 48
# Over noise that random weights amplify, logprobs of two right float32 programs differ by this much.
LOGPROB_TOLERANCE = 1e-3
MILLI, MICRO = 1e3, 1e6


@dataclass(frozen=True)
class Plan:
    """Sizes of one run."""

    device: str
    shape: dict[str, Any]
    batches: tuple[int, ...]
    prefills: tuple[int, ...]
    wide_shape: str
    num_prompts: int


FULL = Plan("cuda", SHAPE_30B, (1, 8, 64, 256), (2048, 8192), "wide", 24)
TOY_SHAPE = {**SHAPE_30B, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TOY_SHAPE |= {"head_dim": 16, "num_experts": 16, "moe_intermediate_size": 32, "vocab_size": 512}
TOY = Plan("cpu", TOY_SHAPE, (1, 4), (64,), "T", 6)


@dataclass
class Report:
    """Lines of Markdown and the numbers behind them; printed as they come, so that nothing is lost with the machine."""

    lines: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    def add(self, *lines: str) -> None:
        self.lines += lines
        print(*lines, sep="\n", flush=True)


# --- correctness ------------------------------------------------------------------------------------------------------


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


# --- limits -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What the device does at best in this run."""

    bytes_per_s: float
    flops_per_s: float


def device_seconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """Median seconds of `run` on the device."""
    seconds = []
    for _ in range(repeats):
        if device == "cuda":
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            run()
            ended.record()
            ended.synchronize()
            seconds.append(began.elapsed_time(ended) / MILLI)
        else:
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure_limits(plan: Plan) -> Limits:
    num_bytes, side = (4 << 30, 8192) if plan.device == "cuda" else (64 << 20, 512)
    source = torch.empty(num_bytes, dtype=torch.uint8, device=plan.device)
    target = torch.empty_like(source)
    copy_s = device_seconds(lambda: target.copy_(source), plan.device, 9)
    left, right = (torch.randn(side, side, device=plan.device).bfloat16() for _ in range(2))
    product_s = device_seconds(lambda: left @ right, plan.device, 15)
    return Limits(2 * num_bytes / copy_s, 2 * side**3 / product_s)


# --- the model and its leader -------------------------------------------------------------------------------------------


class Bench:
    """A model of random weights on the device, and leaders over it."""

    def __init__(self, plan: Plan, folder: str) -> None:
        self.plan = plan
        self.device = torch.device(plan.device)
        hf_config = Qwen3MoeConfig(
            **plan.shape, norm_topk_prob=True, tie_word_embeddings=False, eos_token_id=None, dtype="bfloat16"
        )
        self.model_config = parse_config(hf_config, folder, "auto")
        context = ModelContext(self.model_config, Axis.single(), self.device, "ep", "auto")
        self.model = Qwen3MoeForCausalLM(context, 16384).eval()
        for parameter in self.model.parameters():
            parameter.data.normal_(std=parameter.shape[-1] ** -0.5) if parameter.dim() > 1 else parameter.data.fill_(1)
        self.config = EngineConfig(
            model_path=str(EMBEDDED_MODEL),
            device=plan.device,
            kv_cache_tokens=max(max(plan.batches) * (CONTEXT + 128), 2 * max(plan.prefills)),
            context_length=16384,
            max_running_requests=max(plan.batches),
            chunked_prefill_size=max(plan.prefills),
            enable_prefix_cache=False,
            enable_return_routed_experts=True,
        )
        self.limits = StepLimits.resolve(self.config.chunked_prefill_size, 16384, max(plan.batches))
        self.num_pages = self.config.kv_cache_tokens or 0
        specs = self.model.kv_specs()
        self.kv_store = KVStore(self.model_config.num_layers, self.num_pages, 1, specs, self.device)
        self._num_sent = 0

    def make_runner(self, ring: RouteRing | None) -> ModelRunner:
        return ModelRunner(
            ParallelMesh.single(self.device),
            self.model,
            self.kv_store,
            page_size=1,
            max_running=self.limits.max_running,
            context_length=16384,
            attention_backend="auto",
            capturer=None if ring is None else RoutedExpertsCapturer(ring, self.device),
        )

    @contextmanager
    def leader(self, *, capture: bool) -> Iterator[Leader]:
        ring = RouteRing.create(self.model_config.route_geometry(self.limits.max_tokens), 8) if capture else None
        runner = self.make_runner(ring)
        config = self.config if capture else msgspec.structs.replace(self.config, enable_return_routed_experts=False)
        rank = Rank(config, self.model_config, self.limits, self.num_pages, runner, ring, {})
        with tempfile.TemporaryDirectory(prefix="waybill-") as folder:
            surroundings = Surroundings(folder, str(EMBEDDED_MODEL))
            yield Leader(make_scheduler(rank, surroundings.endpoints), surroundings, self)
            surroundings.close()


class Leader:
    """Drives a scheduler step by step."""

    def __init__(self, scheduler: Any, surroundings: Surroundings, bench: Bench) -> None:
        self.scheduler = scheduler
        self._surroundings = surroundings
        self._bench = bench
        self._rng = np.random.default_rng(0)
        self._num_sent = 0
        self.prefill_tokens = bench.plan.prefills[0]

    def send(self, prompt_tokens: int, max_new_tokens: int, *, routed: bool = True) -> None:
        self._num_sent += 1
        vocab_size = self._bench.model_config.vocab_size
        self._surroundings.outbox.send(
            TokenizedGenerateReqInput(
                dispatch=self._num_sent,
                rid=f"r{self._num_sent}",
                input_ids=self._rng.integers(0, vocab_size, prompt_tokens).astype("<i4").tobytes(),
                sampling_params=SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0, ignore_eos=True),
                return_routed_experts=routed,
            )
        )

    def wait_for_requests(self, count: int) -> None:
        while len(self.scheduler.queues) < count:
            self.scheduler.receive()

    def decode_seconds(self, batch: int) -> list[float]:
        """Seconds of consecutive steps in which `batch` requests decode, host and device together."""
        num_new = NUM_WARM_UPS + NUM_STEPS + 4
        for _ in range(batch):
            self.send(CONTEXT, num_new, routed=False)
        self.wait_for_requests(batch)
        while not all(req.is_decoding for req in self.scheduler.queues.running) or self.scheduler.queues.num_waiting:
            self.scheduler.step()
        for _ in range(NUM_WARM_UPS):
            self.scheduler.step()
        seconds = []
        for _ in range(NUM_STEPS - 8):
            began = time.perf_counter()
            self.scheduler.step()
            seconds.append(time.perf_counter() - began)
        self.drain()
        return seconds

    def prefill_seconds(self, num_tokens: int) -> float:
        """One prompt, from the step's plan to its first token on the host."""
        self.send(num_tokens, 1, routed=False)
        self.wait_for_requests(1)
        began = time.perf_counter()
        self.drain()
        return time.perf_counter() - began

    def routes_of(self, prompt_tokens: int, max_new_tokens: int, count: int) -> list[np.ndarray]:
        """Rows of requests that run together."""
        for _ in range(count):
            self.send(prompt_tokens, max_new_tokens)
        self.wait_for_requests(count)
        self.drain()
        found: list[np.ndarray] = []
        while len(found) < count:
            message, frames = self._surroundings.answers.receive()
            if isinstance(message, OutputBatch):
                for output, frame in zip((o for o in message.outputs if o.routed_experts), frames, strict=True):
                    meta = output.routed_experts
                    assert meta is not None
                    found.append(np.frombuffer(frame, np.uint8).reshape(meta.rows, meta.num_layers, meta.top_k))
        return found

    def drain(self) -> None:
        while not self.scheduler.is_idle:
            self.scheduler.step()


# --- speed ------------------------------------------------------------------------------------------------------------


def decode_bytes(shape: dict[str, Any], routes: list[np.ndarray], batch: int) -> float:
    """Bytes that a decode step must read: dense weights, the experts its tokens chose, keys and values."""
    width, head_dim, heads, kv_heads = (
        shape[k] for k in ("hidden_size", "head_dim", "num_attention_heads", "num_key_value_heads")
    )
    layers = shape["num_hidden_layers"]
    attention = width * (heads + 2 * kv_heads) * head_dim + heads * head_dim * width + width * shape["num_experts"]
    dense = layers * attention + shape["vocab_size"] * width
    decoded = np.stack([rows[CONTEXT:] for rows in routes])
    unique = [len(np.unique(decoded[:, s, m])) for s in range(decoded.shape[1]) for m in range(decoded.shape[2])]
    experts = layers * statistics.mean(unique) * 3 * width * shape["moe_intermediate_size"]
    kv = layers * 2 * kv_heads * head_dim * batch * (CONTEXT + NUM_WARM_UPS + NUM_STEPS / 2)
    return 2 * (dense + experts + kv)


def prefill_flops(shape: dict[str, Any], num_tokens: int) -> float:
    width, head_dim, heads, kv_heads = (
        shape[k] for k in ("hidden_size", "head_dim", "num_attention_heads", "num_key_value_heads")
    )
    attention = width * (heads + 2 * kv_heads) * head_dim + heads * head_dim * width + width * shape["num_experts"]
    experts = shape["num_experts_per_tok"] * 3 * width * shape["moe_intermediate_size"]
    # Causal: half of the score matrix, two products.
    scores = 2 * 2 * heads * head_dim * num_tokens / 2
    return num_tokens * shape["num_hidden_layers"] * (2 * (attention + experts) + scores)


def prefill_bytes(shape: dict[str, Any]) -> float:
    """Bytes that a long prefill must read: all weights, for its tokens choose every expert between them."""
    width, layers = shape["hidden_size"], shape["num_hidden_layers"]
    heads = shape["num_attention_heads"] + shape["num_key_value_heads"]
    experts = shape["num_experts"] * 3 * width * shape["moe_intermediate_size"]
    return 2 * layers * (2 * width * heads * shape["head_dim"] + width * shape["num_experts"] + experts)


def measure_speed(bench: Bench, leader: Leader, limits: Limits, report: Report) -> None:
    """Shares of the limit that binds: bytes over copy bandwidth, or operations over matrix rate."""
    shape = bench.plan.shape
    report.add(
        "",
        "| workload | tokens/s | ms a step | bytes allow, ms | operations allow, ms | share of the limit |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    )
    for batch in bench.plan.batches:
        seconds = statistics.median(leader.decode_seconds(batch))
        routes = leader.routes_of(CONTEXT, 9, batch)
        bytes_s = decode_bytes(shape, routes, batch) / limits.bytes_per_s
        row(report, f"decode, {batch} at once, {CONTEXT} tokens of context", batch, seconds, bytes_s, None)
    for num_tokens in bench.plan.prefills:
        leader.prefill_seconds(num_tokens)
        seconds = statistics.median(leader.prefill_seconds(num_tokens) for _ in range(7))
        bytes_s = prefill_bytes(shape) / limits.bytes_per_s
        flops_s = prefill_flops(shape, num_tokens) / limits.flops_per_s
        row(report, f"prefill, {num_tokens} tokens", num_tokens, seconds, bytes_s, flops_s)


def row(report: Report, name: str, num_tokens: int, seconds: float, bytes_s: float, flops_s: float | None) -> None:
    share = max(bytes_s, flops_s or 0.0) / seconds
    operations, of_rate = "", ""
    if flops_s is not None:
        operations, of_rate = f"{flops_s * MILLI:.2f}", f" ({flops_s / seconds:.0%} of the matrix rate)"
    report.add(
        f"| {name} | {num_tokens / seconds:,.0f} | {seconds * MILLI:.2f} | {bytes_s * MILLI:.2f} | {operations} "
        f"| {share:.0%}{of_rate} |"
    )
    report.numbers[name] = {"tokens_per_s": num_tokens / seconds, "share": share}


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


def profile_step(leader: Leader, name: str, batch: int, report: Report) -> None:
    """Kernels of one step by total time: a decode of `batch` requests, or the prefill of one prompt if it is 0."""
    num_tokens = leader.prefill_tokens
    if batch:
        for _ in range(batch):
            leader.send(CONTEXT, 40, routed=False)
        leader.wait_for_requests(batch)
        while (
            not all(req.is_decoding for req in leader.scheduler.queues.running) or leader.scheduler.queues.num_waiting
        ):
            leader.scheduler.step()
        for _ in range(NUM_WARM_UPS):
            leader.scheduler.step()
    else:
        leader.send(num_tokens, 1, routed=False)
        leader.wait_for_requests(1)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        leader.scheduler.step()
        leader.scheduler.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    leader.drain()
    events = [event for event in profile.key_averages() if event.self_device_time_total > 0]
    events.sort(key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events) or 1
    num_steps = 2 if batch else 1
    report.add(
        "", f"| kernel, {name} | launches | ms | share | if it were free |", "| --- | ---: | ---: | ---: | ---: |"
    )
    for event in events[:12]:
        share = event.self_device_time_total / total
        report.add(
            f"| `{event.key[:60]}` | {event.count // num_steps} | {event.self_device_time_total / num_steps / MILLI:.3f} "
            f"| {share:.1%} | {1 / (1 - share):.2f}x |"
        )
    report.add(
        f"| all | {sum(event.count for event in events) // num_steps} | {total / num_steps / MILLI:.3f} | 100% | |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--toy", action="store_true", help="toy sizes, for a dry run")
    parser.add_argument("--skip", nargs="*", default=[], choices=("correctness", "speed", "capture", "profile"))
    parser.add_argument("--write", action="store_true", help="keep the result in bench/results/gpu.md")
    options = parser.parse_args()
    plan = TOY if options.toy else FULL
    plan = dataclasses.replace(plan, device=options.device)
    report = Report()
    report.add("# The engine on a GPU", "", describe() + ".", "")
    if "correctness" not in options.skip:
        with tempfile.TemporaryDirectory(prefix="waybill-") as folder:
            write_checkpoint(plan.wide_shape, Path(folder), 0)
            check_correctness("embedded model, float32", str(EMBEDDED_MODEL), plan, report)
            check_correctness("random model of real width, float32", folder, plan, report)
    limits = measure_limits(plan)
    report.add(
        "", f"Limits: copy {limits.bytes_per_s / 1e12:.2f} TB/s, matrices {limits.flops_per_s / 1e12:.0f} TFLOP/s."
    )
    with torch.inference_mode(), tempfile.TemporaryDirectory(prefix="waybill-") as folder:
        bench = Bench(plan, folder)
        with bench.leader(capture=True) as leader:
            if "speed" not in options.skip:
                measure_speed(bench, leader, limits, report)
            if "profile" not in options.skip:
                for batch in bench.plan.batches:
                    profile_step(leader, f"decode of {batch}", batch, report)
                profile_step(leader, f"prefill of {leader.prefill_tokens}", 0, report)
                report.add(
                    "",
                    "Kernels overlap (programmatic dependent launch), and one that waits for another counts as running: "
                    "the columns sum to more than a step.",
                )
            if "capture" not in options.skip:
                measure_capture(bench, leader, report)
    print(json.dumps(report.numbers))
    if options.write:
        write_result("gpu.md", "\n".join(report.lines) + "\n")


if __name__ == "__main__":
    main()
