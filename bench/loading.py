"""Seconds until a rank has its weights, from files in the page cache, against reading as many bytes once.

make bench-loading                                 one rank of tp 2, of many small tensors and of tensors of real size
make bench-loading ARGS="--before ../old"          the same with another checkout of Waybill beside it, in turns
make bench-loading ARGS="--device cuda --shapes wide8"    to a GPU

Each round is a process that loads the model (a start), then updates it from the same files, then reads as many bytes as
the rank keeps into memory that is there. Imports are not counted. Medians are reported.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve()
RANKS = 2
READ_BYTES = 8 << 20
NUM_UPDATES = 3
SPLITS = ("ep", "tp")
Seconds = dict[str, list[float]]


def timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def read_once(folder: Path, buffer: bytearray) -> None:
    """As many bytes of a checkpoint as the buffer holds."""
    target = memoryview(buffer)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while target and (count := file.readinto(target[:READ_BYTES])):
                target = target[count:]


def measure(folder: Path, split: str, device_type: str) -> Seconds:
    """In the process of a round. Imports are of the checkout that is measured."""
    import torch  # noqa: PLC0415

    from waybill.engine.config import EngineConfig  # noqa: PLC0415
    from waybill.engine.control.operations import UpdateWeightsFromDisk  # noqa: PLC0415
    from waybill.engine.models.registry import load_model, load_model_config  # noqa: PLC0415
    from waybill.engine.weight_sync.group_registry import GroupRegistry  # noqa: PLC0415
    from waybill.engine.weight_sync.receiver import WeightReceiver  # noqa: PLC0415
    from waybill.parallel.mesh import Axis, ParallelMesh  # noqa: PLC0415
    from waybill.parallel.moe.dispatch import SyncClock  # noqa: PLC0415

    device = torch.device(device_type, 0) if device_type == "cuda" else torch.device("cpu")
    one, axes = Axis.single, [Axis(name, 0, RANKS, None, tuple(range(RANKS))) for name in ("tp", "ep")]
    mesh = ParallelMesh(device, one("world"), one("dp"), *axes, one("node"))
    config = EngineConfig(model_path=str(folder), moe_split=split)
    model_config = load_model_config(config)
    # The device's context, and torch's first kernel.
    torch.zeros(1, device=device).add_(1)
    models = []
    start = timed(lambda: models.append(load_model(config, model_config, 64, mesh, SyncClock())))
    receiver = WeightReceiver(models[0], mesh, GroupRegistry(mesh, 10.0, 1))

    def update() -> None:
        outcome = receiver.update(UpdateWeightsFromDisk(str(folder)))
        assert outcome.success, outcome.message

    num_bytes = sum(piece.storage.nbytes for weight in receiver.weights.values() for piece in weight.pieces)
    buffer = bytearray(num_bytes)
    read_once(folder, buffer)
    return {
        "start": [start],
        "update": [timed(update) for _ in range(NUM_UPDATES)],
        "read": [timed(lambda: read_once(folder, buffer)) for _ in range(NUM_UPDATES)],
        "bytes": [num_bytes],
    }


def run_round(package: Path, folder: Path, split: str, device: str, threads: int) -> Seconds:
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "waybill").symlink_to(package)
        done = subprocess.run(
            [sys.executable, HERE, "--measure", folder, split, "--device", device],
            env=os.environ | {"PYTHONPATH": place, "OMP_NUM_THREADS": str(threads)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    found: Seconds = json.loads(done.stdout.splitlines()[-1])
    return found


def row(shape: str, split: str, found: dict[str, Seconds]) -> str:
    reads = statistics.median(s for seconds in found.values() for s in seconds["read"])
    cells = [shape, split, f"{next(iter(found.values()))['bytes'][0] / 1e6:.0f}", f"{reads:.3f}"]
    for seconds in found.values():
        update = statistics.median(seconds["update"])
        cells += [f"{statistics.median(seconds['start']):.3f}", f"{update:.3f}", f"{update / reads:.1f}"]
    return f"| {' | '.join(cells)} |"


def report(rows: list[str], variants: list[str], options: argparse.Namespace) -> str:
    from machine import describe  # noqa: PLC0415

    head = ["shape", "split", "MB", "plain read s"]
    for variant in variants:
        head += [f"{variant}start s", f"{variant}update s", f"{variant}update, times the read"]
    return "\n".join(
        [
            "# Loading",
            "",
            describe(),
            "",
            f"`make bench-loading`: one rank of tp {RANKS} on {options.device} with {options.threads} threads, files in",
            f"the page cache, medians of {options.rounds} processes a variant, in turn. A start also takes new memory for",
            "the weights; an update has it. MB is what the rank keeps. A plain read brings as many bytes to memory that is",
            "there, 8 MiB at a time.",
            "",
            f"| {' | '.join(head)} |",
            f"| --- | --- |{' ---: |' * (len(head) - 2)}",
            *rows,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["routing30b", "wide"])
    parser.add_argument("--before", type=Path, help="another checkout")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="keep the result in bench/results")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(Path(options.measure[0]), options.measure[1], options.device)))
        return
    from machine import write_result  # noqa: PLC0415
    from make_models import ensure_checkpoint  # noqa: PLC0415

    packages = {"": HERE.parents[1]}
    if options.before:
        packages = {"before: ": options.before.resolve(), "now: ": HERE.parents[1]}
    rows = []
    for shape in options.shapes:
        folder = ensure_checkpoint(shape)
        for split in SPLITS:
            found: dict[str, Seconds] = {name: {} for name in packages}
            for _ in range(options.rounds):
                for name, package in packages.items():
                    for key, values in run_round(package, folder, split, options.device, options.threads).items():
                        found[name].setdefault(key, []).extend(values)
            rows.append(row(shape, split, found))
            print(rows[-1], flush=True)
    text = report(rows, list(packages), options)
    print(text)
    if options.write:
        print(write_result("loading.md", text))


if __name__ == "__main__":
    main()
