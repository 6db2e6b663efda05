"""In bfloat16 on a CPU a request's tokens, log-probabilities and routes are the same bits in every layout that
docs/architecture.md lists: alone, and beside others in an engine whose pool is too small for all of them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from support.tiny_families import write_family

from waybill import Engine
from waybill.parallel.cpu_ops.attention import has_native_attention

pytestmark = [
    pytest.mark.matrix,
    pytest.mark.skipif(not has_native_attention(), reason="needs AVX2 and a C++ compiler"),
]
# Norms of a head; shared experts with a gate and windows; latents; clamps and sinks.
SOME_FAMILIES = ("qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt_oss")
PROMPT_LENGTHS, NUM_TOKENS = (3, 20, 33, 45, 90, 7), 40
# Tokens that have room at once where requests are to be retracted.
TIGHT_POOL = 240
LAYOUTS: list[dict[str, Any]] = [
    {"tp_size": 1, "chunked_prefill_size": 7, "kv_cache_tokens": TIGHT_POOL},
    {"tp_size": 2, "kv_cache_tokens": TIGHT_POOL},
    {"tp_size": 4},
    {"tp_size": 1, "dp_size": 2},
]
OPTIONS: dict[str, Any] = {"dtype": "bfloat16", "page_size": 4, "enable_return_routed_experts": True}


def answers(engine: Engine, prompts: list[list[int]], temperature: float) -> list[tuple[Any, ...]]:
    params = {"temperature": temperature, "max_new_tokens": NUM_TOKENS, "ignore_eos": True, "sampling_seed": 5}
    found = engine.generate(input_ids=prompts, sampling_params=params, return_routed_experts=True, return_logprob=True)
    return [
        (one["output_ids"], one["meta_info"]["output_token_logprobs"], one["meta_info"]["routed_experts"].tobytes())
        for one in found
    ]


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_every_layout_gives_the_same_bits(family: str, tmp_path: Path) -> None:
    folder, rng = write_family(family, tmp_path), random.Random(0)
    prompts = [rng.choices(range(256), k=length) for length in PROMPT_LENGTHS]
    expected = {}
    with Engine(str(folder), tp_size=1, kv_cache_tokens=4096, **OPTIONS) as engine:
        for temperature in (0.0, 1.0):
            expected[temperature] = []
            for prompt in prompts:
                engine.flush_cache()
                expected[temperature] += answers(engine, [prompt], temperature)
    for layout in LAYOUTS:
        with Engine(str(folder), **OPTIONS | {"kv_cache_tokens": 4096} | layout) as engine:
            for temperature, alone in expected.items():
                for found, wanted in zip(answers(engine, prompts, temperature), alone, strict=True):
                    for part, one, other in zip(("tokens", "log-probabilities", "routes"), found, wanted, strict=True):
                        assert one == other, (layout, temperature, part)
