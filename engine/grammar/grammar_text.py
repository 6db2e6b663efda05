"""What a caller asks for - a JSON schema, a regular expression, EBNF, tags in free text - as one text for llguidance."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark

# Of a schema, expression or grammar. What its text may grow to when it is compiled has bounds of its own, see `limits.py`.
MAX_GRAMMAR_CHARS = 256 << 10
# Each structure is compared with each of them.
MAX_TRIGGERS = 64
# Without a bound a model that likes spaces writes them until its length ends.
JSON_OPTIONS: dict[str, Any] = {"whitespace_flexible": False, "whitespace_pattern": r"[ \t\n\r]{1,32}"}
ANY_OBJECT = '{"type": "object"}'


def from_json_schema(schema: str) -> str:
    """
    Raises:
        ValueError: it is no JSON object.
    """
    check_length(schema)
    parsed = parse_object(schema)
    # `const` alone is an enum of one; the library takes the options of a schema from within it, which are not the caller's.
    if "x-guidance" in parsed:
        raise ValueError("must not have 'x-guidance'")
    return LLMatcher.grammar_from_json_schema(schema, overrides=JSON_OPTIONS)  # type: ignore[arg-type]


def from_regex(pattern: str) -> str:
    check_length(pattern)
    return LLMatcher.grammar_from_regex(pattern)


def from_ebnf(text: str) -> str:
    """Lark's syntax, or that of GBNF, in which rules have `::=` and the first one is `root`.

    Raises:
        ValueError: GBNF cannot be read.
    """
    check_length(text)
    if "::=" not in text:
        return LLMatcher.grammar_from_lark(text)
    try:
        return LLMatcher.grammar_from_lark(gbnf_to_lark(text))
    # The library's reader of GBNF descends with the text.
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    # It has no narrower class for a rule that is missing.
    except Exception as error:
        raise ValueError(f"is no GBNF: {str(error)[:200]}") from None


def from_structural_tag(text: str, special_tokens: Collection[str]) -> str:
    """Free text, in which each trigger begins one of the structures that start with it.

    `{"structures": [{"begin", "schema", "end"}, ...], "triggers": [...]}`; a trigger that is a special token of the model
    is that token, any other one is text.

    Raises:
        ValueError: it is not of this form; the message says which part.
    """
    check_length(text)
    tag = parse_object(text)
    if "format" in tag:
        raise ValueError("'format' is not supported: must have 'structures' and 'triggers'")
    structures, triggers = tag.get("structures"), tag.get("triggers")
    if not isinstance(structures, list) or not structures:
        raise ValueError("structures: must be a list of at least one {begin, schema, end}")
    if not isinstance(triggers, list) or not triggers or not all(isinstance(one, str) and one for one in triggers):
        raise ValueError("triggers: must be a list of texts, at least one and none empty")
    if len(triggers) > MAX_TRIGGERS:
        raise ValueError(f"triggers: must be at most {MAX_TRIGGERS}")
    rules = [tag_rule(index, one, triggers, special_tokens) for index, one in enumerate(structures)]
    options = " | ".join(f"tag_{index}" for index in range(len(rules)))
    head = f"%llguidance {{}}\nstart: ({options})* tag_end\ntag_end: TAG_TEXT\nTAG_TEXT: /(.|\\n)*/\n"
    return head + "\n".join(rules)


def tag_rule(index: int, structure: Any, triggers: list[str], special_tokens: Collection[str]) -> str:
    """One structure as rules of Lark."""
    where = f"structures.{index}"
    if not isinstance(structure, dict):
        raise ValueError(f"{where}: must be an object with begin, schema and end")
    begin, end, schema = structure.get("begin"), structure.get("end", ""), structure.get("schema", {})
    if not isinstance(begin, str) or not isinstance(end, str):
        raise ValueError(f"{where}: begin and end must be text")
    if not isinstance(schema, dict):
        raise ValueError(f"{where}.schema: must be a JSON schema (an object)")
    trigger = next((one for one in triggers if begin.startswith(one)), None)
    if trigger is None:
        raise ValueError(f"{where}.begin: must start with one of the triggers")
    options = {**schema, "x-guidance": JSON_OPTIONS}
    rest = f"{terminal(begin[len(trigger) :])} %json {json.dumps(options)} {terminal(end, special_tokens)}"
    if trigger in special_tokens:
        return f"tag_{index}: TAG_TEXT {terminal(trigger, special_tokens)} {rest}"
    return f"tag_{index}_trig[lazy]: TAG_TEXT {terminal(trigger)}\ntag_{index}: tag_{index}_trig {rest}"


def terminal(text: str, special_tokens: Collection[str] = ()) -> str:
    """Text as Lark writes it, or a special token, if it is one.

    Raises:
        ValueError: Lark has no way to write this special token; as text it would be letters, which the model never writes.
    """
    if text in special_tokens:
        if not (text.startswith("<") and text.endswith(">")):
            raise ValueError(f"{text[:80]!r} is a special token without angle brackets, which is not supported")
        return text
    return json.dumps(text) if text else ""


def check_length(text: str) -> None:
    if len(text) > MAX_GRAMMAR_CHARS:
        raise ValueError(f"has {len(text)} characters, must have at most {MAX_GRAMMAR_CHARS}")


def parse_object(text: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise ValueError(f"must be a JSON object: {error}") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(parsed, dict):
        raise ValueError("must be a JSON object")
    return parsed
