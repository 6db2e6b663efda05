"""`response_format`: what an answer's text must be."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import model_validator

from ...grammar.grammar_text import ANY_OBJECT
from ...validation.field_error import FieldError, shown
from ...validation.request_model import RequestModel

# `strict` changes nothing: an answer is always of the schema.
JSON_SCHEMA_FIELDS = {"name", "description", "schema", "strict"}


class ResponseFormat(RequestModel):
    """What an answer's text must be: any, JSON, JSON of a schema, or text with structures in it."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: dict[str, Any] | None = None
    structures: list[Any] | None = None
    triggers: list[Any] | None = None

    @model_validator(mode="after")
    def _check_type(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise FieldError("json_schema: must be given with type 'json_schema', and with no other", "json_schema")
        for field in self.json_schema or {}:
            if field not in JSON_SCHEMA_FIELDS:
                raise FieldError(f"json_schema.{shown(field)}: is no field of this request", "json_schema")
        if self.json_schema is not None and not isinstance(self.json_schema.get("schema"), dict):
            raise FieldError("json_schema.schema: must be a JSON schema (an object)", "json_schema")
        return self

    @property
    def grammar(self) -> dict[str, Any]:
        """The field of `sampling_params` that says the same; {} for text."""
        match self.type:
            case "json_object":
                return {"json_schema": ANY_OBJECT}
            case "json_schema":
                assert self.json_schema is not None
                return {"json_schema": self.json_schema["schema"]}
            case "structural_tag":
                return {"structural_tag": {"structures": self.structures, "triggers": self.triggers}}
        return {}
