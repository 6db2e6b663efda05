"""What a grammar costs: tokens per second with a JSON schema for every request, beside the same requests without one.

    python -m waybill.bench.structured_output [--model FOLDER] [--tp 2] [--concurrency 32] [--tokens 96] [--repeats 5]

Both kinds run in turn on one engine, and the middle of the repeats counts. All put out the same number of tokens: the
schema has strings without end, and the end of the sequence is ignored. Prints a row of
`bench/results/structured_output.md`, and writes it to the folder `$OUT`, if that is set.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

from waybill import Engine

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string"}, "minItems": 20},
        "parent": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    },
    "required": ["name", "age", "tags", "parent"],
    "additionalProperties": False,
}
ROOT = Path(__file__).parents[1]


def run(engine: Engine, num: int, num_tokens: int, seed: int, fields: dict[str, Any]) -> float:
    """Output tokens per second."""
    params = {
        "max_new_tokens": num_tokens,
        "min_new_tokens": num_tokens,
        "ignore_eos": True,
        "temperature": 1.0,
        **fields,
    }
    prompts = [f"start with {seed * num + index}" for index in range(num)]
    began = time.perf_counter()
    answers = engine.generate(prompts, [params | {"sampling_seed": index} for index in range(num)])
    seconds = time.perf_counter() - began
    return sum(answer["meta_info"]["completion_tokens"] for answer in answers) / seconds


def hardware(device: str) -> str:
    if device == "cuda":
        import torch  # noqa: PLC0415

        return f"{torch.cuda.get_device_name()}, {os.cpu_count()} CPU cores"
    return f"CPU ({platform.processor() or platform.machine()}), {os.cpu_count()} cores, shared with other work"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "examples" / "tiny_moe" / "checkpoint"))
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dummy", action="store_true", help="weights made in place of the checkpoint's")
    options = parser.parse_args()
    load = {"load_format": "dummy"} if options.dummy else {}
    kinds = {"unconstrained": {}, "JSON schema": {"json_schema": SCHEMA}}
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    with Engine(options.model, tp_size=options.tp, device=options.device, max_running_requests=64, **load) as engine:
        for repeat in range(-1, options.repeats):
            for name, fields in kinds.items():
                rate = run(engine, options.concurrency, options.tokens, repeat + 1, fields)
                if repeat >= 0:
                    rates[name].append(rate)
        steps = engine.get_server_info()
    middle = {name: statistics.median(found) for name, found in rates.items()}
    ratio = middle["JSON schema"] / middle["unconstrained"]
    pairs = [a / b for a, b in zip(rates["JSON schema"], rates["unconstrained"], strict=True)]
    row = (
        f"| {hardware(options.device)}, tp {options.tp} | {Path(options.model).name}, {steps['vocab_size']} tokens "
        f"| {options.concurrency} x {options.tokens} | {middle['unconstrained']:.0f} | {middle['JSON schema']:.0f} "
        f"| {ratio:.2f} | {', '.join(f'{pair:.2f}' for pair in pairs)} |"
    )
    print(row)
    out = os.environ.get("OUT")
    if out:
        (Path(out) / "structured_output.md").write_text(row + "\n")


if __name__ == "__main__":
    main()
