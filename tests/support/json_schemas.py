"""Two hundred JSON schemas by their features: every kind of value, bounds on it, and how schemas are joined."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]

SCALARS: list[Schema] = [{"type": kind} for kind in ("string", "integer", "number", "boolean", "null")]
STRINGS: list[Schema] = [
    *(
        {"type": "string", "minLength": low, "maxLength": high}
        for low, high in [(0, 0), (0, 3), (2, 2), (3, 9), (12, 20)]
    ),
    *({"type": "string", "maxLength": high} for high in (1, 4, 16)),
    *(
        {"type": "string", "pattern": pattern}
        for pattern in (
            "^[a-z]{3}$",
            "^[A-Z][a-z]*$",
            "^\\d{4}-\\d{2}$",
            "^(foo|bar)+$",
            "^x?y*z+$",
            '^[^"]{2,5}$',
            "^a.c$",
            "^\\w{1,8}$",
            "^é{1,3}$",
            "^[0-9a-f]{8}$",
            "^#[0-9A-Fa-f]{6}$",
            "^(\\([0-9]{3}\\))?[0-9]{3}-[0-9]{4}$",
        )
    ),
    *({"type": "string", "format": form} for form in ("date", "time", "date-time", "email", "ipv4", "uuid")),
]
NUMBERS: list[Schema] = [
    *(
        {"type": "integer", "minimum": low, "maximum": high}
        for low, high in [(0, 0), (0, 9), (-5, 5), (10, 99), (-1000, 70000)]
    ),
    *({"type": "integer", "minimum": low} for low in (-3, 0, 17)),
    *({"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + 3} for low in (-2, 0, 99)),
    *(
        {"type": "number", "minimum": low, "maximum": high}
        for low, high in [(0, 1), (-1.5, 1.5), (0.25, 0.75), (100, 200)]
    ),
    *({"type": "number", "exclusiveMinimum": low, "exclusiveMaximum": low + 1} for low in (-1, 0)),
    *({"type": "integer", "multipleOf": step} for step in (2, 5, 10)),
]
CHOICES: list[Schema] = [
    *(
        {"enum": values}
        for values in (["a"], ["a", "b", "c"], [1, 2, 3], ["x", 1, None, True], ["日本", "naïve"], [[1], {"a": 1}])
    ),
    *({"const": value} for value in ("fixed", 7, None, True, {"a": [1, 2]}, 'quo"te', "ключ")),
    *({"type": kinds} for kinds in (["string", "null"], ["integer", "boolean"], ["number", "null", "boolean"])),
]
BRANCHES: list[Schema] = [
    {"anyOf": [{"type": "integer"}, {"type": "boolean"}]},
    {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "null"}]},
    {"anyOf": [{"const": "a"}, {"const": 1}, {"type": "array", "items": {"type": "null"}, "maxItems": 2}]},
    {"oneOf": [{"type": "string", "maxLength": 2}, {"type": "integer"}]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"type": "integer", "maximum": 30}]},
    {"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"type": "object"}]},
    {"anyOf": [{"type": "null"}, {"enum": ["on", "off"]}]},
]


def record(properties: dict[str, Schema], required: list[str] | None = None, *, is_open: bool = False) -> Schema:
    """An object of these properties, all of them required unless some are named."""
    names = list(properties) if required is None else required
    schema: Schema = {"type": "object", "properties": properties, "required": names}
    return schema if is_open else schema | {"additionalProperties": False}


def array(items: Schema, low: int | None = None, high: int | None = None) -> Schema:
    bounds = {"minItems": low, "maxItems": high}
    return {"type": "array", "items": items, **{name: value for name, value in bounds.items() if value is not None}}


def objects(leaves: list[Schema]) -> Iterator[Schema]:
    for index, leaf in enumerate(leaves):
        other = leaves[(index * 7 + 3) % len(leaves)]
        match index % 6:
            case 0:
                yield record({"a": leaf, "b": other})
            case 1:
                yield record({"a": leaf, "b": other}, ["b"])
            case 2:
                yield record({"a": leaf}, [], is_open=False)
            case 3:
                yield record({"outer": record({"inner": leaf}), "list": array(other, 0, 2)})
            case 4:
                yield record({"ключ": leaf, "日本語": {"type": "boolean"}, "naïve key": {"type": "null"}})
            case _:
                yield {
                    "type": "object",
                    "additionalProperties": leaf,
                    "properties": {"n": {"type": "integer"}},
                    "required": ["n"],
                }


def arrays(leaves: list[Schema]) -> Iterator[Schema]:
    bounds = [(0, 2), (1, 1), (2, 3), (None, 2), (3, 4), (0, 0)]
    for index, leaf in enumerate(leaves):
        yield array(leaf, *bounds[index % len(bounds)])
    yield {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "boolean"}], "items": False, "minItems": 2}


def references() -> Iterator[Schema]:
    """`$ref` to definitions, some of which are recursive."""
    point = record({"x": {"type": "integer"}, "y": {"type": "integer"}})
    yield {"$defs": {"point": point}, "$ref": "#/$defs/point"}
    yield record({"from": {"$ref": "#/$defs/p"}, "to": {"$ref": "#/$defs/p"}}) | {"$defs": {"p": point}}
    yield array({"$ref": "#/definitions/p"}, 1, 2) | {"definitions": {"p": point}}
    tree = record({"v": {"type": "integer"}, "left": {"$ref": "#/$defs/tree"}}, ["v"])
    yield {"$defs": {"tree": tree}, "$ref": "#/$defs/tree"}
    linked = record({"v": {"type": "boolean"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}})
    yield {"$defs": {"node": linked}, "$ref": "#/$defs/node"}
    yield {"$defs": {"n": array({"$ref": "#/$defs/n"}, 0, 1)}, "$ref": "#/$defs/n"}
    yield record({"child": {"$ref": "#"}, "leaf": {"type": "null"}}, ["leaf"])
    yield {"$defs": {"s": {"type": "string", "maxLength": 3}}, "anyOf": [{"$ref": "#/$defs/s"}, {"type": "integer"}]}


def schemas() -> list[Schema]:
    leaves = [*SCALARS, *STRINGS, *NUMBERS, *CHOICES, *BRANCHES]
    found = [*leaves, *objects(leaves), *arrays(leaves[::2]), *references(), {"type": "object"}, {"type": "array"}, {}]
    for depth in range(2, 8):
        nested: Schema = {"type": "integer", "minimum": 0, "maximum": 9}
        for level in range(depth):
            nested = record({f"k{level}": nested}) if level % 2 else array(nested, 1, 2)
        found.append(nested)
    return found
