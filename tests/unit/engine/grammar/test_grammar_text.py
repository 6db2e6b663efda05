"""What a caller asks for as a grammar: what is no such thing is refused with the reason."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from waybill.engine.frontend.grammar_checks import GrammarChecks
from waybill.engine.frontend.sampling_params import SamplingParamsInput
from waybill.engine.grammar.checker import why_ended
from waybill.engine.grammar.grammar_text import (
    MAX_GRAMMAR_CHARS,
    from_ebnf,
    from_json_schema,
    from_regex,
    from_structural_tag,
)

CHECKPOINT = Path(__file__).parents[4] / "examples" / "tiny_moe" / "checkpoint"
TAG = {"begin": "<f=a>", "schema": {"type": "object"}, "end": "</f>"}


def tag(**fields: object) -> str:
    return json.dumps({"structures": [TAG], "triggers": ["<f="], **fields})


@pytest.mark.parametrize(
    ("make", "text", "words"),
    [
        (from_json_schema, "[", "must be a JSON object: "),
        (from_json_schema, "[]", "must be a JSON object$"),
        (from_json_schema, "[" * 100_000, "nested too deeply"),
        (from_json_schema, '{"x-guidance": {}}', "must not have 'x-guidance'"),
        (from_regex, "a" * (MAX_GRAMMAR_CHARS + 1), "must have at most 262144"),
        (from_ebnf, 'root ::= ("a"', "is no GBNF"),
        (from_structural_tag, tag(format={}), "'format' is not supported"),
        (from_ebnf, "root ::= missing", "is no GBNF: Rule 'missing' not found"),
        (from_structural_tag, tag(triggers=["<f="] * 65), "triggers: must be at most 64"),
        (from_structural_tag, tag(triggers=[]), "triggers: must be a list"),
        (from_structural_tag, tag(triggers=["x"]), "structures.0.begin: must start with one of the triggers"),
        (from_structural_tag, tag(structures=[5]), "structures.0: must be an object"),
    ],
)
def test_refused(make: object, text: str, words: str) -> None:
    arguments = (text, frozenset()) if make is from_structural_tag else (text,)
    with pytest.raises(ValueError, match=words):
        make(*arguments)


def test_a_special_token_that_lark_cannot_write_is_refused() -> None:
    """As text it would be letters: the model writes its token, and the grammar would bind nothing."""
    text = json.dumps({"structures": [{**TAG, "begin": "[CALLS]f"}], "triggers": ["[CALLS]"]})
    with pytest.raises(ValueError, match="special token without angle brackets"):
        from_structural_tag(text, frozenset({"[CALLS]"}))
    assert '"[CALLS]"' in from_structural_tag(text, frozenset()), "text that looks like one is text"


def test_an_object_nested_too_deeply_is_refused_by_its_field() -> None:
    schema: dict[str, object] = {}
    for _ in range(5000):
        schema = {"not": schema}
    with pytest.raises(ValueError, match=r"^json_schema: is nested too deeply"):
        SamplingParamsInput(json_schema=schema).grammar(())


def test_the_process_that_checks_says_what_cannot_be_compiled_and_is_started_again() -> None:
    good, bad, unknown = from_regex("a+"), from_regex("a("), from_json_schema('{"not": {}}')

    async def run() -> None:
        checks = GrammarChecks(str(CHECKPOINT))
        found = await asyncio.gather(*(checks.check(one, 264) for one in (good, bad, unknown, good)))
        assert found[0] == found[3] == "" and "unclosed group" in found[1] and "Unimplemented keys" in found[2]
        assert checks._num_checks == 3, "of two that are the same one is asked about"
        process = checks._process
        assert process is not None
        process.kill()
        await process.wait()
        assert await checks.check(bad, 264) == found[1], "verdicts are remembered"
        assert await checks.check(from_ebnf('root ::= "a" | [b-c]+'), 264) == ""
        checks.close()
        assert checks._process is not None and await checks._process.wait() == 0, "it ends with its input"

    asyncio.run(run())


def test_without_a_tokenizer_the_refusal_says_so(tmp_path: Path) -> None:
    async def run() -> str:
        checks = GrammarChecks(str(tmp_path))
        try:
            return await checks.check(from_regex("a"), 264)
        finally:
            checks.close()
            assert checks._process is not None
            await checks._process.wait()

    assert "has no tokenizer" in asyncio.run(run())


def test_the_bound_that_was_hit_is_named() -> None:
    assert "4 s of processor time" in why_ended(-24) and "1024 MiB of memory" in why_ended(-6)
