"""What stands beside a field of the engine's configuration: its legal values, its flag and its help.

    page_size: Annotated[int, Option("tokens of one KV page", at_least=1)] = 1

The check of the field, its flag on the command line, `--help` and the table in `docs/api.md` come from it.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any

import msgspec


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """A range of numbers; `also` is one value more, outside of it."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    also: int | None = None

    def __contains__(self, value: float) -> bool:
        # Every comparison asks for the legal side, so that NaN lies in no range.
        return value == self.also or (
            (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.at_least is not None and self.at_most is not None:
            return f"lie in {number(self.at_least)} .. {number(self.at_most)}"
        if self.above is not None and self.below is not None:
            return f"lie between {number(self.above)} and {number(self.below)}"
        assert self.at_least is not None, "no other ranges are in use"
        also = "" if self.also is None else f"{self.also} or "
        return f"be {also}at least {number(self.at_least)}"


def number(value: float) -> str:
    """As a user would write it: 1, 0.5, 1e6."""
    return f"{value:g}".replace("e+0", "e")


@dataclass(frozen=True)
class Option:
    """`flag` is for a field whose flag is not its name (`claim_ttl_s`: `--claim-ttl`), and for a switch that is on unless
    it is given. Without `choices` and `bounds` every value of the field's type is legal; None is, where the type has it."""

    help: str
    flag: str | None = None
    metavar: str | None = None
    choices: tuple[str | int, ...] = ()
    bounds: Bounds | None = None

    @property
    def legal(self) -> str:
        """What a value must do or be; empty where there is nothing to say."""
        if len(self.choices) == 2:
            return f"be {self.choices[0]} or {self.choices[1]}"
        if self.choices:
            return f"be one of {', '.join(map(str, self.choices))}"
        return "" if self.bounds is None else str(self.bounds)

    def check(self, name: str, value: Any) -> None:
        """
        Raises:
            ValueError: it is not legal; the message names the field and its range.
        """
        if value is None:
            return
        if (self.choices and value not in self.choices) or (self.bounds is not None and value not in self.bounds):
            raise ValueError(f"{name}={value!r}: must {self.legal}")


@dataclass(frozen=True)
class OptionField:
    """A field with its option. `kind` is its type without None: bool, int, float, str, or tuple for several strings.
    `default` is `msgspec.NODEFAULT` where the field has none."""

    name: str
    kind: type
    default: Any
    option: Option

    @property
    def flag(self) -> str:
        """Units are said by the help, not by the flag."""
        return "--" + (self.option.flag or self.name.removesuffix("_s").replace("_", "-"))


def option_fields(struct: type[msgspec.Struct]) -> Mapping[str, OptionField]:
    """Of a struct whose every field has an `Option`, by name, in the order of the fields."""
    hints = typing.get_type_hints(struct, include_extras=True)
    fields = {}
    for field in msgspec.structs.fields(struct):
        annotated, option = typing.get_args(hints[field.name])
        kinds = typing.get_args(annotated) if isinstance(annotated, UnionType) else (annotated,)
        (kind,) = (kind for kind in kinds if kind is not type(None))
        fields[field.name] = OptionField(field.name, typing.get_origin(kind) or kind, field.default, option)
    return fields
