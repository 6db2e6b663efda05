"""How many rows of routes differ by FP8: `python bench/fp8_rows.py CHECKPOINT`, one in floating point, quantised here.

The same prompts through one rank: weights as they are, weights in FP8 and exact activations, both in FP8. Routes of prompts
alone: every row has seen the same tokens. A row differs if any layer chose another set of experts.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from machine import describe, write_result
from quantise_fp8 import quantise_checkpoint

from waybill import Engine

NUM_PROMPTS, PROMPT_TOKENS = 16, 256


def routes_of(checkpoint: str, prompts: list[list[int]], dtype: str, activations: str) -> np.ndarray:
    """[prompts, tokens, layers, K], the experts of a row in order of their ids."""
    with Engine(
        checkpoint,
        tp_size=1,
        dtype=dtype,
        kv_cache_tokens=NUM_PROMPTS * (PROMPT_TOKENS + 1),
        enable_return_routed_experts=True,
        fp8_activations=activations,
    ) as engine:
        answers = engine.generate(input_ids=prompts, sampling_params={"max_new_tokens": 0}, return_routed_experts=True)
    return np.sort(np.stack([answer["meta_info"]["routed_experts"] for answer in answers]), axis=-1)


def differing(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Shares of rows, and of choices of a layer."""
    choices = (one != other).any(axis=-1)
    return float(choices.any(axis=-1).mean()), float(choices.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--vocab", type=int, default=256, help="prompts are random ids below it")
    parser.add_argument("--write", action="store_true", help="keep the result in bench/results/fp8_rows.md")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, options.vocab, (NUM_PROMPTS, PROMPT_TOKENS)).tolist()
    with tempfile.TemporaryDirectory(prefix="waybill-") as folder:
        quantise_checkpoint(options.checkpoint, Path(folder))
        plain = routes_of(str(options.checkpoint), prompts, options.dtype, "auto")
        exact, both = (routes_of(folder, prompts, options.dtype, how) for how in ("exact", "e4m3"))
    lines = [
        "# Rows of routes that FP8 changes",
        "",
        f"{describe()}. `bench/fp8_rows.py`: {options.checkpoint.resolve().parent.name}, {options.dtype}, "
        f"{NUM_PROMPTS} random prompts of {PROMPT_TOKENS} tokens, {plain.shape[2]} layers that route.",
        "",
        "| compared | rows with another choice in any layer | choices of a layer |",
        "| --- | ---: | ---: |",
    ]
    for name, pair in (
        ("FP8 weights, exact activations, with weights as they are", (exact, plain)),
        ("FP8 weights, FP8 activations, with exact activations", (both, exact)),
        ("FP8 weights, FP8 activations, with weights as they are", (both, plain)),
    ):
        rows, choices = differing(*pair)
        lines.append(f"| {name} | {rows:.1%} | {choices:.2%} |")
    print("\n".join(lines))
    if options.write:
        write_result("fp8_rows.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
