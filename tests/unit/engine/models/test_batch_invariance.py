"""In bfloat16 on a CPU a token has the same bits - hidden state, logits, routes and their weights - alone and in any
batch, however its prompt is cut, whatever the cache had of it, and on one, two and four ranks: every family, through the
operators.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from support.thread_ranks import Computed, Segment, ThreadRanks
from support.tiny_families import FAMILIES

from waybill.parallel.cpu_ops.attention import has_native_attention

pytestmark = [
    pytest.mark.skipif(not has_native_attention(), reason="needs AVX2 and a C++ compiler"),
]
LENGTH, PROMPT, MAX_BATCH = 40, 20, 64
# Wide enough that a part of a sum is more than one step of an operator's; what a vision tower gives keeps its width.
WIDE = {"hidden_size": 160, "num_attention_heads": 16, "intermediate_size": 480}
CHANGES: dict[str, dict[str, int]] = {
    "qwen3_vl_moe": {"num_attention_heads": 16, "intermediate_size": 480},
    **dict.fromkeys(("deepseek_v3", "glm4_moe_lite", "kimi_k2"), WIDE | {"num_key_value_heads": 16}),
}
# Wide norms and shared experts, latents and a sigmoid, clamps, sinks and windows: the others are made of the same parts.
IN_THE_SUITE = ("qwen2_moe", "deepseek_v3", "gpt_oss", "olmoe")
EACH_FAMILY = [pytest.param(f, marks=() if f in IN_THE_SUITE else pytest.mark.matrix) for f in FAMILIES]
LAYOUTS = [
    (2, "ep"),
    pytest.param(4, "ep", marks=pytest.mark.matrix),
    (2, "tp"),
    pytest.param(4, "tp", marks=pytest.mark.matrix),
]
# Whose experts have slices of so few columns that four ranks cannot share them.
TOO_NARROW = {("kimi_k2", 4, "tp")}


def tokens_of(request: int) -> list[int]:
    return random.Random(request).choices(range(256), k=LENGTH)


def assert_same(found: Computed, expected: Computed) -> None:
    for name, one, other in zip(("hidden", "logits", "ids", "weights"), found.parts(), expected.parts(), strict=True):
        assert torch.equal(one, other), name


def in_chunks(ranks: ThreadRanks, request: int, sizes: Sequence[int]) -> Computed:
    tokens, parts, first = tokens_of(0), [], 0
    for size in sizes:
        parts.append(ranks.step([Segment(request, first, tokens[first : first + size])]))
        first += size
    return Computed.joined(parts)


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_a_request_alone_in_chunks_and_in_batches(family: str) -> None:
    ranks = ThreadRanks(family, 1, "ep", MAX_BATCH + 1, LENGTH, **CHANGES.get(family, WIDE))
    whole = ranks.step([Segment(0, 0, tokens_of(0))])
    for sizes in ([1] * LENGTH, [7] * 5 + [5], [16, 16, 8], [PROMPT] + [1] * (LENGTH - PROMPT)):
        assert_same(in_chunks(ranks, 1, sizes), whole)
    for size in (2, 3, 5, 8, 17, MAX_BATCH):
        # All decode beside each other; the last one prefills beside them.
        prompts = [Segment(i, 0, tokens_of(i)[:PROMPT]) for i in range(size)]
        parts = [ranks.step(prompts).rows(slice(PROMPT))]
        for position in range(PROMPT, LENGTH):
            decodes = [Segment(i, position, tokens_of(i)[position : position + 1]) for i in range(size)]
            if position == PROMPT + 1:
                decodes.append(Segment(MAX_BATCH, 0, tokens_of(MAX_BATCH)))
            parts.append(ranks.step(decodes).rows(slice(1)))
        assert_same(Computed.joined(parts), whole)
    ranks.close()


@pytest.mark.parametrize(("tp_size", "split"), LAYOUTS)
@pytest.mark.parametrize("family", EACH_FAMILY)
def test_one_rank_has_the_bits_of_several(family: str, tp_size: int, split: str) -> None:
    """For each way to split experts."""
    if (family, tp_size, split) in TOO_NARROW:
        pytest.skip("an expert's columns are too few")
    one, several = (ThreadRanks(family, size, split, 2, LENGTH, **CHANGES.get(family, WIDE)) for size in (1, tp_size))
    whole = one.step([Segment(0, 0, tokens_of(0))])
    assert_same(several.step([Segment(0, 0, tokens_of(0))]), whole)
    assert_same(in_chunks(several, 1, [PROMPT, 7] + [1] * (LENGTH - PROMPT - 7)), whole)
    for each in (one, several):
        each.close()
