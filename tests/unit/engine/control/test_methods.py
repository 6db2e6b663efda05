"""The methods of `Engine` and of the trainer's client say what is declared: every default stands in one place, and where a
method shows it to an editor it is the same."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import msgspec
import pytest

from waybill.engine.control.methods import ControlMethods
from waybill.engine.control.operations import (
    OPERATIONS,
    CheckWeights,
    ControlOperation,
    Operation,
    UpdateWeightsFromTensor,
)
from waybill.engine.ipc.frontend_messages import ControlReq
from waybill.launch.engine import Engine

METHODS: dict[type[Operation], Callable[..., Any]] = {
    kind: getattr(ControlMethods, kind.route().removeprefix("/"))
    for kind in OPERATIONS
    if kind not in (UpdateWeightsFromTensor, CheckWeights)
}
FILES = (ControlMethods.update_weights_from_file, Engine.update_weights_from_tensor)
PAIRS = [*METHODS.items(), *((UpdateWeightsFromTensor, method) for method in FILES)]
# What a method has and a declaration has not, or has otherwise.
DIFFERENT = {
    ("update_weights_from_file", "path"): inspect.Parameter.empty,
}
OWN = {("update_weights_from_tensor", "named_tensors")}


class Kept(ControlMethods):
    def __init__(self) -> None:
        self.operation: Any = None

    def _control(self, operation: ControlOperation) -> Any:
        self.operation = operation


@pytest.mark.parametrize(("kind", "method"), PAIRS, ids=lambda part: part.__name__)
def test_a_method_has_the_fields_and_defaults_of_its_operation(kind: type[Operation], method: Any) -> None:
    declared = {field.name: field for field in msgspec.structs.fields(kind)}
    types, hints = get_type_hints(kind), get_type_hints(method)
    for name, parameter in list(inspect.signature(method).parameters.items())[1:]:
        place = (method.__name__, name)
        if place in OWN:
            continue
        default = declared[name].default
        expected = DIFFERENT.get(place, parameter.empty if default is msgspec.NODEFAULT else default)
        assert parameter.default == expected, name
        # Methods take any sequence of tags.
        assert hints[name] == types[name] or place in DIFFERENT or name == "tags"
    given = {name for name, _ in list(inspect.signature(method).parameters.items())[1:]}
    assert {name for name, field in declared.items() if field.required} <= given


@pytest.mark.parametrize(("kind", "method"), METHODS.items(), ids=lambda part: part.__name__)
def test_every_argument_arrives_in_its_field(kind: type[Operation], method: Any) -> None:
    kept = Kept()
    given: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(method).parameters.items())[1:]:
        given[name] = not parameter.default if isinstance(parameter.default, bool) else [name]
    method(kept, **given)
    assert type(kept.operation) is kind
    assert given.items() <= msgspec.structs.asdict(kept.operation).items()


def test_every_operation_can_be_sent() -> None:
    assert set(OPERATIONS) == set(get_args(ControlOperation))
    for kind in OPERATIONS:
        fields = {field.name: "x" for field in msgspec.structs.fields(kind) if get_type_hints(kind)[field.name] is str}
        fields |= {
            field.name: [] for field in msgspec.structs.fields(kind) if field.required and field.name not in fields
        }
        numbers = {field.name: 1 for field in msgspec.structs.fields(kind) if get_type_hints(kind)[field.name] is int}
        operation = kind(**{**fields, **numbers})
        message = msgspec.msgpack.encode(ControlReq(1, "op", operation))  # type: ignore[arg-type]
        assert msgspec.msgpack.decode(message, type=ControlReq).operation == operation
