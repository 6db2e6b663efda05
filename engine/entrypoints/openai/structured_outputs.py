"""`structured_outputs`: vLLM's field for what an answer's text must be."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from ...grammar.grammar_text import ANY_OBJECT
from ...validation.dialect_fields import VLLM_STRUCTURED_OUTPUTS, is_neutral, legal_words
from ...validation.field_error import FieldError, shown


@dataclass(frozen=True)
class StructuredOutputs:
    """`grammar` is the field of `sampling_params` that says the same as `kind` does here."""

    kind: str
    grammar: dict[str, Any]

    @property
    def names(self) -> dict[str, str]:
        """What the native field is called here, for its refusals."""
        return dict.fromkeys(self.grammar, f"structured_outputs.{self.kind}")


def refusal(reason: str, kind: str = "") -> FieldError:
    field = f"structured_outputs.{kind}" if kind else "structured_outputs"
    return FieldError(f"{field}: {reason}", field)


def from_choice(choices: Any) -> dict[str, Any]:
    if not isinstance(choices, list) or not choices or not all(isinstance(one, str) and one for one in choices):
        raise refusal("must be a list of texts, at least one and none empty", "choice")
    return {"regex": "|".join(map(re.escape, choices))}


def from_json_object(value: Any) -> dict[str, Any]:
    if value is not True:
        raise refusal("must be true or absent", "json_object")
    return {"json_schema": ANY_OBJECT}


# The same by other names: which, and whether the value may be an object.
RENAMED = {
    "json": ("json_schema", True),
    "regex": ("regex", False),
    "grammar": ("ebnf", False),
    "structural_tag": ("structural_tag", True),
}
KINDS = (*RENAMED, "choice", "json_object")


def to_grammar(kind: str, value: Any) -> dict[str, Any]:
    if kind == "choice":
        return from_choice(value)
    if kind == "json_object":
        return from_json_object(value)
    name, may_be_object = RENAMED[kind]
    if not isinstance(value, str) and not (may_be_object and isinstance(value, dict)):
        raise refusal("must be text or an object" if may_be_object else "must be text", kind)
    return {name: value}


def parse_structured_outputs(value: Any) -> StructuredOutputs:
    """
    Raises:
        FieldError: it is no object, has a field that is unknown or not supported, or not exactly one of `KINDS`.
    """
    if not isinstance(value, dict):
        raise refusal("must be an object")
    given = {name: one for name, one in value.items() if one is not None}
    for name in given.keys() - set(KINDS):
        if name not in VLLM_STRUCTURED_OUTPUTS:
            raise refusal("is no field of this request", shown(name))
        legal = VLLM_STRUCTURED_OUTPUTS[name]
        if not is_neutral(given[name], legal):
            raise refusal(f"is not supported: must be {legal_words(legal)}", name)
    kinds = [name for name in KINDS if name in given]
    if len(kinds) != 1:
        raise refusal(f"must have exactly one of {', '.join(KINDS)}")
    return StructuredOutputs(kinds[0], to_grammar(kinds[0], given[kinds[0]]))


StructuredOutputsField = Annotated[
    StructuredOutputs, BeforeValidator(parse_structured_outputs), WithJsonSchema({"type": "object"})
]
