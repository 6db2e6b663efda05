"""What the models of all bodies share: unknown fields and faults are refused (HTTP 400) one at a time, by name."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from .dialect_fields import Neutral, is_neutral, legal_words
from .field_error import FieldError, shown
from .token_ids import MAX_PROMPTS

MAX_NAME_CHARS = 512

T = TypeVar("T")
Model = TypeVar("Model", bound="RequestModel")


def has_surrogate(text: str) -> bool:
    """Whether text has half of a UTF-16 pair, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def check_utf8(name: str) -> str:
    if has_surrogate(name):
        raise ValueError("must be text that UTF-8 can encode")
    return name


def refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"must be an integer, not {str(value).lower()}")
    return value


def refuse_bool_as_real(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"must be a number, not {str(value).lower()}")
    return value


# JSON's true is no 1, and what travels as a message has 64 bits.
Number = Annotated[int, BeforeValidator(refuse_bool), Field(ge=-(2**63), lt=2**63)]
# Goes nowhere unless it is in a range that is checked later; it can be printed.
AnyNumber = Annotated[int, BeforeValidator(refuse_bool), Field(ge=-(2**127), lt=2**127)]
Real = Annotated[float, BeforeValidator(refuse_bool_as_real)]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS), AfterValidator(check_utf8)]
# A list ends at its first fault: an error for each item would be gigabytes.
Items = Annotated[list[T], Field(fail_fast=True)]
# One for each prompt of a request.
PerPrompt = Annotated[list[T], Field(fail_fast=True, max_length=MAX_PROMPTS)]


class RequestModel(BaseModel):
    """A JSON object. Null means the default, and a field that is unknown or not implemented is refused by name.

    `neutral_fields` change the result and are not implemented: legal at values that ask for nothing, see
    `dialect_fields.py`. `ignored_fields` change nothing in the result. `id_fields` hold token ids: they reach the model as
    arrays.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    neutral_fields: ClassVar[Neutral] = {}
    ignored_fields: ClassVar[tuple[str, ...]] = ()
    id_fields: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _drop_dialect_fields(cls, data: Any) -> Any:
        """Stops at the first field that is refused; pydantic would make an error for each."""
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if value is None or name in cls.ignored_fields:
                continue
            if name in cls.neutral_fields:
                _check_neutral(name, value, cls.neutral_fields[name])
            elif name in cls.model_fields or cls.model_config["extra"] == "allow":
                kept[name] = value
            else:
                raise FieldError(f"{shown(name)}: is no field of this request", shown(name))
        return kept


def _check_neutral(name: str, value: Any, legal: tuple[Any, ...]) -> None:
    if not is_neutral(value, legal):
        raise FieldError(f"{name} is not supported: must be {legal_words(legal)}", name)


def validate(model: type[Model], fields: Any) -> Model:
    """
    Raises:
        ValueError: a field is unknown, unsupported, of the wrong type or out of range; the message names it. A
            `FieldError` where it is one field.
    """
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> ValueError:
    """The first of pydantic's errors, in the form of our own: the field, then what is wrong."""
    errors = error.errors(include_url=False, include_input=False)
    first = errors[0]
    # Of the branches of a union, the one that came furthest.
    same_field = [one for one in errors if one["loc"][:1] == first["loc"][:1]]
    first = max(same_field, key=lambda one: (len(one["loc"]), one["type"] == "too_long"))
    path = [shown(part) for part in first["loc"] if not _is_branch(part)]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, FieldError):
        if path and path[-1] == cause.field.split(".", 1)[0]:
            path.pop()
        return cause.inside(path)
    if not path and first["type"] in ("model_attributes_type", "model_type", "dict_type"):
        return FieldError("body: must be a JSON object, sent with Content-Type: application/json", "body")
    reason = first["msg"].removeprefix("Value error, ")
    where = ".".join(path)
    return FieldError(f"{where}: {reason}", where) if where else ValueError(reason)


def _is_branch(part: int | str) -> bool:
    """What pydantic adds to a field's place for the branches of a union: types, validators, models."""
    return isinstance(part, str) and (part in ("int", "str", "bool", "float") or "[" in part or part[:1].isupper())
