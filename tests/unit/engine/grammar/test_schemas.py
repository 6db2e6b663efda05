"""Two hundred schemas through the masks and the sampler of the engine: whatever the model's scores, an answer that ends is
JSON of its schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from support.json_schemas import schemas

from waybill.engine.grammar.grammar_text import from_json_schema
from waybill.engine.grammar.mask_maker import MaskMaker
from waybill.engine.io_struct import OutputOptions, SamplingParams
from waybill.engine.runner.sampler import SamplingRow, sample

CHECKPOINT = Path(__file__).parents[4] / "examples" / "tiny_moe" / "checkpoint"
VOCAB_SIZE, EOS = 264, 260
MAX_TOKENS = 160
SCHEMAS = schemas()
# Bytes that end something: without them random text would go on.
FORMATS = jsonschema.Draft202012Validator.FORMAT_CHECKER
ENDS = [*b'"]},', EOS]


@pytest.fixture(scope="module")
def maker() -> MaskMaker:
    return MaskMaker(str(CHECKPOINT), VOCAB_SIZE, (EOS,), num_threads=2)


def generate(maker: MaskMaker, grammars: list[str], seed: int, **params: Any) -> list[list[int] | None]:
    """Output ids of each, without the end; None where the length ended first. All are in one batch, as in a step."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index, grammar in enumerate(grammars):
        sampling = SamplingParams(sampling_seed=seed * 1000 + index, grammar=grammar, **params)
        rows.append(SamplingRow(sampling, OutputOptions(), (EOS,), constraint=maker.start(grammar, None)))
    outputs: list[list[int]] = [[] for _ in rows]
    running = list(range(len(rows)))
    for position in range(MAX_TOKENS):
        logits = torch.randn(len(running), VOCAB_SIZE, generator=generator) * 2
        logits[:, ENDS] += 4
        logits[:, list(b" \t\n\r")] -= 6
        here = [rows[i] for i in running]
        constraints = [row.constraint for row in here if row.constraint is not None]
        masks = maker.masks(constraints, [position] * len(here))
        tokens = sample(logits, here, masks).outcomes.tolist()
        maker.advance(list(zip(constraints, tokens, strict=True)))
        for row in here:
            row.position += 1
        for i, token in zip(running, tokens, strict=True):
            assert token >= 0, f"{SCHEMAS[i]} after {bytes(outputs[i])!r}: {rows[i].constraint.failure}"
            outputs[i].append(token)
        running = [i for i, token in zip(running, tokens, strict=True) if token != EOS]
        if not running:
            break
    return [None if i in running else output[:-1] for i, output in enumerate(outputs)]


@pytest.mark.parametrize(("seed", "params"), [(1, {}), (2, {"temperature": 0.0}), (3, {"top_k": 5, "top_p": 0.9})])
def test_what_ends_is_valid(maker: MaskMaker, seed: int, params: dict[str, Any]) -> None:
    assert len(SCHEMAS) >= 200
    outputs = generate(maker, [from_json_schema(json.dumps(schema)) for schema in SCHEMAS], seed, **params)
    ended = 0
    for schema, output in zip(SCHEMAS, outputs, strict=True):
        if output is None:
            continue
        ended += 1
        text = bytes(output).decode()
        jsonschema.validate(json.loads(text), schema, format_checker=FORMATS)
    assert ended >= 0.9 * len(SCHEMAS), "most end, or nothing was shown"
