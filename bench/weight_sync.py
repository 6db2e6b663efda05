"""Seconds to bring new weights to an engine of two ranks on this machine, against copying the same bytes once.

make bench-weight_sync                         the 1.7 B model of make_models.py, written to a temporary folder
make bench-weight_sync ARGS="--shape wide"     another one
make bench-weight_sync ARGS="--checks"         also what checksums of all tensors take

The rounds go through all ways in turn, so that what else the machine does meets all of them; medians are reported.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import describe, write_result
from make_models import SHAPES, write_checkpoint
from safetensors.torch import load_file

from waybill import Engine
from waybill.engine.weight_sync.sender import WeightSender

BUCKET_MIB = (32, 128, 512)
MIB = 1 << 20
TP = 2


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor, in this process' own memory."""
    return {
        name: tensor.clone()
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def copy_once(tensors: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        targets[name].copy_(tensor)


def measure(folder: Path, rounds: int, *, checks: bool) -> dict[str, list[float]]:
    tensors = load_all(folder)
    targets = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    seconds: dict[str, list[float]] = {}
    with Engine(str(folder), tp_size=TP, kv_cache_tokens=1024, context_length=512) as engine:
        ways: dict[str, Callable[[], object]] = {"copying the bytes once": lambda: copy_once(tensors, targets)}
        senders = []
        for mib in BUCKET_MIB:
            sender = WeightSender([(engine, TP)], group_name=f"{mib} MiB", bucket_bytes=mib * MIB)
            sender.connect()
            senders.append(sender)
            ways[f"distributed, buckets of {mib} MiB"] = lambda sender=sender: sender.send(tensors.items())
        ways["tensors in shared memory"] = lambda: engine.update_weights_from_tensor(tensors)
        ways["disk, files in the page cache"] = lambda: engine.update_weights_from_disk(str(folder))
        if checks:
            ways["checksums of all tensors"] = engine.checksum_weights
        for _ in range(1 + rounds):
            for name, way in ways.items():
                seconds.setdefault(name, []).append(timed(way))
                print(f"{name}: {seconds[name][-1]:.2f} s", flush=True)
        for sender in senders:
            sender.close()
    # The first round touches everything for the first time.
    return {name: values[1:] for name, values in seconds.items()}


def report(shape: str, num_parameters: int, seconds: dict[str, list[float]]) -> str:
    num_bytes = 2 * num_parameters
    num_rounds = len(seconds["copying the bytes once"])
    base = statistics.median(seconds["copying the bytes once"])
    lines = [
        "# Weight sync",
        "",
        f"{describe()}",
        "",
        f"`make bench-weight_sync`: {num_parameters / 1e9:.2f} B parameters in bfloat16 ({num_bytes / 1e9:.2f} GB, shape",
        f"{shape}) from one process to an engine of tp {TP} on the same machine. Medians of {num_rounds} rounds that go",
        "through all rows in turn, after one that does not count.",
        "",
        "| way | seconds | fastest - slowest | GB/s | times the copy |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, values in seconds.items():
        median = statistics.median(values)
        lines.append(
            f"| {name} | {median:.2f} | {min(values):.2f} - {max(values):.2f} "
            f"| {num_bytes / median / 1e9:.2f} | {median / base:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="M")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--checks", action="store_true", help="also measure checksums")
    parser.add_argument("--write", action="store_true", help="keep the result in bench/results")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="waybill-weight-sync-"))
    try:
        num_parameters = write_checkpoint(options.shape, folder, seed=0)
        text = report(options.shape, num_parameters, measure(folder, options.rounds, checks=options.checks))
    finally:
        shutil.rmtree(folder)
    print(text)
    if options.write:
        print(write_result("weight_sync.md", text))


if __name__ == "__main__":
    main()
