"""Bytes and seconds of an update by what a real optimiser step has changed, against the full one.

make bench-delta_updates                       two ranks on the CPU, the 1.7 B model of make_models.py in a temporary folder
make bench-delta_updates ARGS="--shape T"      a toy, for a look

A model of random weights, in bfloat16, has float32 masters: each lies anywhere in the interval that rounds to its weight,
as after many steps of training. One step: forward and backward of the whole model on random tokens in transformers, and
torch's AdamW on the masters. What then differs in bfloat16 is what is sent. Ways go in turn, forth and back between the
weights before and after the step; medians are reported. Every result is compared by the checksums of all tensors.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from machine import describe, write_result
from make_models import write_checkpoint
from model_shapes import SHAPES
from time_limit import end_after
from transformers import AutoModelForCausalLM

from waybill import Engine
from waybill.engine.weight_sync.checksum import checksum
from waybill.engine.weight_sync.delta_codec import bits_of, changed_places, encode_chunk, encode_index
from waybill.engine.weight_sync.delta_file import write_delta
from waybill.engine.weight_sync.delta_maker import DeltaBucket, DeltaMaker
from waybill.engine.weight_sync.delta_sender import MemorySender
from waybill.engine.weight_sync.sender import WeightSender, gathered_tensors

LEARNING_RATE = 1e-6
DENSITIES = (0.0001, 0.001, 0.01, 0.03, 0.1, 0.2, 0.5, 1.0)
NUM_TOKENS = 512
CHUNK = 1 << 22
CONTEXT = {"kv_cache_tokens": 1024, "context_length": 512}
Tensors = dict[str, torch.Tensor]


def take_step(model: torch.nn.Module, learning_rate: float) -> None:
    """One step of AdamW on float32 masters, tensor by tensor, so that no more than one master is held."""
    torch.manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (4, NUM_TOKENS // 4))
    advantages = torch.randn(4)
    logprobs = model(tokens, use_cache=False).logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    (-(logprobs.float() * advantages[:, None]).mean()).backward()
    parameters = list(model.parameters())
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for parameter in parameters:
        if parameter.grad is None:
            continue
        master = torch.nn.Parameter(within_rounding(parameter.detach()))
        assert torch.equal(master.detach().bfloat16(), parameter.detach())
        master.grad = parameter.grad.float()
        parameter.grad = None
        torch.optim.AdamW([master], lr=learning_rate, weight_decay=0.0).step()
        parameter.data = master.detach().bfloat16()


def within_rounding(weight: torch.Tensor) -> torch.Tensor:
    """float32 values, uniform in what rounds to these."""
    bits = weight.contiguous().float().view(torch.int32)
    # Half of the distance to the next value of bfloat16, less one; what is 0 stays.
    moved = bits + torch.randint(-0x7FFF, 0x8000, bits.shape, dtype=torch.int32)
    return torch.where(weight == 0, bits, moved).view(torch.float32)


def changed_share(before: Tensors, after: Tensors) -> float:
    changed = sum(int((bits_of(before[name]) != bits_of(tensor)).sum()) for name, tensor in after.items())
    return changed / sum(tensor.numel() for tensor in after.values())


def unfused(tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    """Under the names of a checkpoint."""
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        if kind == "gate_up_proj":
            for expert, (gate, up) in enumerate(each.chunk(2) for each in tensor):
                yield f"{stem}.{expert}.gate_proj.weight", gate
                yield f"{stem}.{expert}.up_proj.weight", up
        elif kind == "down_proj":
            yield from ((f"{stem}.{expert}.down_proj.weight", each) for expert, each in enumerate(tensor))
        else:
            yield name, tensor


def sums_of(tensors: Tensors) -> dict[str, str]:
    return {name: checksum(tensor) for name, tensor in unfused(tensors)}


@dataclass
class Way:
    """How an engine gets tensors: full, and as a delta since a version."""

    name: str
    full: Callable[[Tensors, str], object]
    delta: Callable[[list[DeltaBucket], str, str], object]
    full_s: list[float] = field(default_factory=list)
    cold_s: list[float] = field(default_factory=list)
    warm_s: list[float] = field(default_factory=list)


@contextmanager
def ways_to(engine: Engine, tp: int, folder: Path, base: Path) -> Iterator[list[Way]]:
    group = WeightSender([(engine, tp)], timeout_s=300.0)
    memory = MemorySender([engine])

    def from_files(buckets: list[DeltaBucket], base_version: str, version: str) -> None:
        for number, bucket in enumerate(buckets):
            write_delta(bucket, folder / f"delta-{number}.safetensors")
        engine.update_weights_from_disk(
            str(folder), load_format="delta", base_version=base_version, weight_version=version
        )

    def sent_by(sender: WeightSender | MemorySender) -> Callable[[list[DeltaBucket], str, str], object]:
        return lambda buckets, old, new: sender.send_delta(buckets, base_version=old, weight_version=new)

    with group:
        yield [
            Way("group (gloo)", lambda t, v: group.send(t.items(), weight_version=v), sent_by(group)),
            Way("shared memory", lambda t, v: memory.send(t.items(), weight_version=v), sent_by(memory)),
            # The full one reads the checkpoint in the page cache, which is the weights before the step.
            Way("disk", lambda t, v: engine.update_weights_from_disk(str(base), weight_version=v), from_files),
        ]


def timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


@dataclass
class Result:
    share: float
    full_bytes: int
    delta_bytes: int
    manifest_bytes: int
    held_bytes: int
    make_s: list[float]
    ways: list[Way]
    densities: list[str]
    # Of the machine, at the end of each round.
    loads: list[float]


def measure(shape: str, folder: Path, rounds: int, learning_rate: float) -> Result:
    base_folder, delta_folder = folder / "base", folder / "delta"
    delta_folder.mkdir()
    write_checkpoint(shape, base_folder, seed=0)
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in gathered_tensors(model)}
    take_step(model, learning_rate)
    after = dict(gathered_tensors(model))
    share = changed_share(before, after)
    print(f"{share:.2%} of the values changed", flush=True)
    expected = {"before": sums_of(before), "after": sums_of(after)}
    maker = DeltaMaker()
    for _ in maker.remember(before.items()):
        pass
    make_s: list[float] = []
    loads: list[float] = []
    forth: list[DeltaBucket] = []
    back: list[DeltaBucket] = []
    for _ in range(rounds):
        make_s.append(timed(lambda: forth.__setitem__(slice(None), maker.deltas(after.items()))))
        make_s.append(timed(lambda: back.__setitem__(slice(None), maker.deltas(before.items()))))
    with (
        Engine(str(base_folder), tp_size=2, device="cpu", **CONTEXT) as engine,
        ways_to(engine, 2, delta_folder, base_folder) as ways,
    ):
        for number in range(1 + rounds):
            for way in ways:
                seconds = run_way(engine, way, before, forth, back, expected)
                print(way.name, *(f"{each:.2f}" for each in seconds), flush=True)
                # The first round touches everything for the first time.
                if number:
                    for kept, each in zip((way.full_s, way.cold_s, way.warm_s), seconds, strict=True):
                        kept.append(each)
            loads.append(os.getloadavg()[0])
    return Result(
        share,
        sum(bucket.num_full_bytes for bucket in forth),
        sum(len(bucket.payload) for bucket in forth),
        sum(len(bucket.manifest.encode()) for bucket in forth),
        maker.num_held_bytes,
        make_s,
        ways,
        density_table(),
        loads[1:],
    )


def run_way(
    engine: Engine,
    way: Way,
    before: Tensors,
    forth: list[DeltaBucket],
    back: list[DeltaBucket],
    expected: dict[str, dict[str, str]],
) -> tuple[float, float, float]:
    """Full; a delta whose base must be summed up; one that follows a delta. All end where the trainer is."""

    def check(state: str) -> None:
        found = engine.checksum_weights()
        assert found == {name: expected[state][name] for name in found}, f"{way.name}: not the trainer's bytes"

    full_s = timed(lambda: way.full(before, "before"))
    check("before")
    cold_s = timed(lambda: way.delta(forth, "before", "after"))
    check("after")
    warm_s = timed(lambda: way.delta(back, "after", "before"))
    check("before")
    return full_s, cold_s, warm_s


def density_table() -> list[str]:
    """What a chunk takes in each form, in bytes a value, by the share that changed by one step."""
    lines = [
        "| changed | gaps8 | gaps16 | bitmap | all steps | chosen | bytes a value | times smaller than bfloat16 |",
        "| ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: |",
    ]
    torch.manual_seed(0)
    old = bits_of(torch.randn(CHUNK).bfloat16())
    for density in DENSITIES:
        new = old + (torch.rand(CHUNK) < density).to(torch.int16)
        places = changed_places(old, new)
        sizes = [
            (encode_index(kind, places, CHUNK).nbytes + len(places)) / CHUNK for kind in ("gaps8", "gaps16", "bitmap")
        ]
        chunk, _ = encode_chunk(old, new, places)
        cells = " | ".join(f"{size:.4f}" for size in sizes)
        lines.append(
            f"| {density:.2%} | {cells} | 1.0000 | {chunk.index}, {chunk.values} "
            f"| {chunk.num_bytes / CHUNK:.4f} | {2 * CHUNK / chunk.num_bytes:.0f} |"
        )
    return lines


def report(result: Result, shape: str, rounds: int, learning_rate: float) -> str:
    ratio = result.full_bytes / (result.delta_bytes + result.manifest_bytes)
    lines = [
        "# Delta updates",
        "",
        describe(),
        "",
        f"`make bench-delta_updates`: {result.full_bytes / 2e9:.2f} B parameters in bfloat16 (shape {shape}), an engine",
        "of tp 2 and its trainer on the same machine. One step of AdamW (its first, without decay, gradients clipped at",
        f"norm 1) at a learning rate of {learning_rate:g} on float32 masters, gradients from {NUM_TOKENS} tokens:",
        f"**{result.share:.2%}** of the bfloat16 values changed. Medians of {rounds} rounds. After each update all",
        "checksums were the trainer's.",
        "",
        "| | full | delta | full / delta | without the making |",
        "| --- | ---: | ---: | ---: | ---: |",
        f"| bytes (of the delta, {result.manifest_bytes / 1e3:.0f} kB are its manifest) | {result.full_bytes / 1e6:.1f} MB "
        f"| {(result.delta_bytes + result.manifest_bytes) / 1e6:.1f} MB | {ratio:.0f} | |",
    ]
    make_s = statistics.median(result.make_s)
    for way in result.ways:
        full = statistics.median(way.full_s)
        for words, values in (("after a full update", way.cold_s), ("after a delta", way.warm_s)):
            median = statistics.median(values)
            lines.append(
                f"| {way.name}, {words} | {full:.2f} s ({min(way.full_s):.2f} - {max(way.full_s):.2f}) "
                f"| {make_s + median:.2f} s: {make_s:.2f} + {median:.2f} ({min(values):.2f} - {max(values):.2f}) "
                f"| {full / (make_s + median):.2f} | {full / median:.2f} |"
            )
    lines += [
        "",
        "Seconds of a delta are those that the trainer needs to make it and those until the engine has it; the last ratio",
        f"leaves the first out. The trainer holds {result.held_bytes / 1e9:.2f} GB: the weights that it sent last. After a",
        "full update the engine first sums up the weights that the delta changes; after a delta it knows their sums. Of",
        "the disk the full one reads files that are in the page cache.",
        "",
        f"Load averages of the machine while the rounds ran: {', '.join(f'{load:.1f}' for load in result.loads)}. They",
        "count this program and its engine, too; what is more than those was other work, which made seconds longer.",
        "",
        f"Of {CHUNK} normal values of which a share changed by one step of bfloat16, in bytes a value (2 when sent whole):",
        "",
        *result.densities,
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="M")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--minutes", type=float, default=30.0, help="end after this time at the latest")
    parser.add_argument("--write", action="store_true", help="keep the result in bench/results")
    options = parser.parse_args()
    end_after(60 * options.minutes)
    folder = Path(tempfile.mkdtemp(prefix="waybill-delta-updates-"))
    try:
        result = measure(options.shape, folder, options.rounds, options.learning_rate)
    finally:
        shutil.rmtree(folder)
    text = report(result, options.shape, options.rounds, options.learning_rate)
    print(text)
    if options.write:
        print(write_result("delta_updates.md", text))


if __name__ == "__main__":
    main()
