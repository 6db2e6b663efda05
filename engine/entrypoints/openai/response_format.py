"""`response_format`: what an answer's text must be."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ...grammar.grammar_text import ANY_OBJECT
from ...validation.field_error import FieldError
from ...validation.request_model import RequestModel


class JsonSchemaFormat(RequestModel):
    """`strict` changes nothing: an answer is always of the schema."""

    ignored_fields = ("strict", "description")

    name: str = ""
    json_schema: dict[str, Any] = Field({}, alias="schema")


class ResponseFormat(RequestModel):
    """What an answer's text must be: any, JSON, JSON of a schema, or text with structures in it."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None
    structures: list[Any] | None = None
    triggers: list[Any] | None = None

    @model_validator(mode="after")
    def _check_type(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise FieldError("json_schema: must be given with type 'json_schema', and with no other", "json_schema")
        return self

    @property
    def grammar(self) -> dict[str, Any]:
        """The field of `sampling_params` that says the same; {} for text."""
        match self.type:
            case "json_object":
                return {"json_schema": ANY_OBJECT}
            case "json_schema":
                assert self.json_schema is not None
                return {"json_schema": self.json_schema.json_schema}
            case "structural_tag":
                return {"structural_tag": {"structures": self.structures, "triggers": self.triggers}}
        return {}
