"""Seconds to bring new weights to an engine on this machine, against copying the same bytes once.

make bench-weight_sync                         two ranks on the CPU, the 1.7 B model of make_models.py in a temporary folder
make bench-weight_sync ARGS="--shape wide"     another one
make bench-weight_sync ARGS="--checks"         also what checksums of all tensors take
make bench-weight_sync ARGS="--device cuda"    10 GB from this process, on one GPU, to an engine on another, by NCCL
make bench-weight_sync ARGS="--device cpu --device-way --shape T"    the same by gloo, a dry run

The rounds go through all ways in turn, so that what else the machine does meets all of them; medians are reported.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import describe, write_result
from make_models import make_tensor, write_checkpoint, write_config
from model_shapes import SHAPES, fuse_experts, make_config, tensor_shapes
from safetensors.torch import load_file
from time_limit import end_after

from waybill import Engine
from waybill.engine.weight_sync.sender import WeightSender

BUCKET_MIB = (32, 128, 512)
MIB = 1 << 20
COPY = "copying the bytes once"
CONTEXT = {"kv_cache_tokens": 1024, "context_length": 512}
Tensors = dict[str, torch.Tensor]
Ways = dict[str, Callable[[], object]]
Seconds = dict[str, list[float]]


@dataclass(frozen=True)
class Setting:
    """Where the weights are and where they go."""

    tp: int
    # Of the trainer, which is this process.
    device: torch.device
    # Where the copy goes that all is compared with.
    target: torch.device
    options: dict[str, Any]
    title: str
    file: str


CPU = torch.device("cpu")
ON_CPU = Setting(
    2, CPU, CPU, {"device": "cpu"}, "from one process to an engine of tp 2 on the same machine", "weight_sync"
)
BETWEEN_GPUS = Setting(
    1,
    torch.device("cuda", 1),
    torch.device("cuda", 0),
    {"device": "cuda", "load_format": "dummy"},
    "from a process on the second GPU to an engine of tp 1 on the first, by NCCL",
    "weight_sync_gpu",
)
DRY_RUN = Setting(1, CPU, CPU, {"device": "cpu", "load_format": "dummy"}, "from one process to another, by gloo", "")


def load_all(folder: Path) -> Tensors:
    """Every tensor, in this process' own memory."""
    return {
        name: tensor.clone()
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def make_all(shape: str, device: torch.device) -> Tensors:
    """Random ones, on the device."""
    generator = torch.Generator(device).manual_seed(1)
    return {name: make_tensor(name, size, generator) for name, size in tensor_shapes(make_config(shape))}


def synchronize(*devices: torch.device) -> None:
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def timed(action: Callable[[], object], *devices: torch.device) -> float:
    synchronize(*devices)
    began = time.perf_counter()
    action()
    synchronize(*devices)
    return time.perf_counter() - began


def copy_once(tensors: Tensors, targets: Tensors) -> None:
    for name, tensor in tensors.items():
        targets[name].copy_(tensor)


@contextmanager
def senders(engine: Engine, setting: Setting, forms: dict[str, Tensors]) -> Iterator[Ways]:
    """A way for each form of the tensors and size of bucket."""
    ways: Ways = {}
    opened = []
    for mib in BUCKET_MIB:
        sender = WeightSender(
            [(engine, setting.tp)],
            group_name=f"{mib} MiB",
            bucket_bytes=mib * MIB,
            device=setting.device,
            timeout_s=60.0,
        )
        sender.connect()
        opened.append(sender)
        for form, tensors in forms.items():
            ways[f"distributed, buckets of {mib} MiB{form}"] = lambda s=sender, t=tensors: s.send(t.items())
    yield ways
    for sender in opened:
        sender.close()


def run_rounds(ways: Ways, rounds: int, setting: Setting, until: float) -> Seconds:
    """Each way once a round; a round that would begin after `until` does not."""
    seconds: Seconds = {}
    for number in range(1 + rounds):
        if number > 1 and time.monotonic() > until:
            break
        for name, way in ways.items():
            seconds.setdefault(name, []).append(timed(way, setting.device, setting.target))
            print(f"{name}: {seconds[name][-1]:.3f} s", flush=True)
    # The first round touches everything for the first time.
    return {name: values[1:] for name, values in seconds.items()}


def measure_on_cpu(shape: str, folder: Path, rounds: int, until: float, *, checks: bool) -> Seconds:
    """All ways of a checkpoint that is there."""
    write_checkpoint(shape, folder, seed=0)
    tensors = load_all(folder)
    targets = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    with (
        Engine(str(folder), tp_size=ON_CPU.tp, **ON_CPU.options, **CONTEXT) as engine,
        senders(engine, ON_CPU, {"": tensors}) as ways,
    ):
        ways = {COPY: lambda: copy_once(tensors, targets), **ways}
        ways["tensors in shared memory"] = lambda: engine.update_weights_from_tensor(tensors)
        ways["disk, files in the page cache"] = lambda: engine.update_weights_from_disk(str(folder))
        if checks:
            ways["checksums of all tensors"] = engine.checksum_weights
        return run_rounds(ways, rounds, ON_CPU, until)


def measure_between_devices(shape: str, folder: Path, rounds: int, until: float, setting: Setting) -> Seconds:
    """Tensors that only the trainer's device has, under the names of the checkpoint and as `transformers` holds them."""
    config = write_config(shape, folder)
    tensors = make_all(shape, setting.device)
    fused = fuse_experts(tensors, config)
    targets = {name: torch.empty_like(tensor, device=setting.target) for name, tensor in fused.items()}
    forms = {", a tensor an expert": tensors, ", experts fused": fused}
    with (
        Engine(str(folder), tp_size=setting.tp, **setting.options, **CONTEXT) as engine,
        senders(engine, setting, forms) as ways,
    ):
        seconds = run_rounds({COPY: lambda: copy_once(fused, targets), **ways}, rounds, setting, until)
        for name in list(tensors)[:: max(1, len(tensors) // 8)]:
            arrived = torch.tensor(engine.get_weights_by_name(name, 2))
            assert torch.equal(arrived, tensors[name][:2].float().cpu()), name
        return seconds


def report(shape: str, seconds: Seconds, setting: Setting) -> str:
    num_parameters = sum(torch.Size(size).numel() for _, size in tensor_shapes(make_config(shape)))
    num_bytes = 2 * num_parameters
    base = statistics.median(seconds[COPY])
    lines = [
        "# Weight sync",
        "",
        f"{describe()}",
        "",
        f"`make bench-weight_sync`: {num_parameters / 1e9:.2f} B parameters in bfloat16 ({num_bytes / 1e9:.2f} GB, shape",
        f"{shape}) {setting.title}. Medians of {len(seconds[COPY])} rounds that go",
        "through all rows in turn, after one that does not count.",
        "",
        "| way | seconds | fastest - slowest | GB/s | times the copy | seconds for 10 GB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, values in seconds.items():
        median = statistics.median(values)
        lines.append(
            f"| {name} | {median:.3f} | {min(values):.3f} - {max(values):.3f} | {num_bytes / median / 1e9:.2f} "
            f"| {median / base:.1f} | {median / num_bytes * 1e10:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--device-way", action="store_true", help="on the CPU, what --device cuda does")
    parser.add_argument("--shape", choices=SHAPES, help="M, or wide8 between GPUs, if not given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no round later, and end soon after")
    parser.add_argument("--checks", action="store_true", help="also measure checksums")
    parser.add_argument("--write", action="store_true", help="keep the result in bench/results")
    options = parser.parse_args()
    end_after(60 * options.minutes + 60)
    until = time.monotonic() + 60 * options.minutes
    setting = BETWEEN_GPUS if options.device == "cuda" else DRY_RUN if options.device_way else ON_CPU
    shape = options.shape or ("wide8" if setting is BETWEEN_GPUS else "M")
    folder = Path(tempfile.mkdtemp(prefix="waybill-weight-sync-"))
    try:
        if setting is ON_CPU:
            seconds = measure_on_cpu(shape, folder, options.rounds, until, checks=options.checks)
        else:
            seconds = measure_between_devices(shape, folder, options.rounds, until, setting)
    finally:
        shutil.rmtree(folder)
    text = report(shape, seconds, setting)
    print(text)
    if options.write and setting.file:
        print(write_result(f"{setting.file}.md", text))


if __name__ == "__main__":
    main()
