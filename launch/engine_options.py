"""The engine's options on a command line, one flag for each field of `EngineConfig`."""

from __future__ import annotations

import argparse
from typing import Any

import msgspec

from ..engine.config import ENGINE_OPTIONS, EngineConfig
from ..engine.validation.option import OptionField


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except where the help's words say what happens without the option, and of switches."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.nargs == 0:
            return action.help
        return super()._get_help_string(action)


def add_engine_options(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """`defaults` are those of a command that are not the field's."""
    group = parser.add_argument_group("engine")
    for field in ENGINE_OPTIONS.values():
        add_option(group, field, defaults.get(field.name, field.default))


def add_option(group: argparse._ArgumentGroup, field: OptionField, default: Any) -> None:
    option = field.option
    assert default is not msgspec.NODEFAULT, f"a command has to bring a default of {field.name}"
    if field.kind is bool:
        # A switch turns the field's default over, whatever the command's is.
        action = "store_false" if field.default else "store_true"
        group.add_argument(field.flag, dest=field.name, action=action, default=default, help=option.help)
        return
    metavar = option.metavar or field.flag.removeprefix("--").replace("-", "_").upper()
    group.add_argument(
        field.flag,
        dest=field.name,
        type=split_list if field.kind is tuple else field.kind,
        default=default,
        choices=option.choices or None,
        metavar=None if option.choices else metavar,
        help=option.help if option.bounds is None else f"{option.help}; must {option.legal}",
    )


def split_list(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def engine_config(options: argparse.Namespace) -> EngineConfig:
    """
    Raises:
        ValueError: one is wrong; the message names it and its range.
    """
    return EngineConfig(**{name: getattr(options, name) for name in ENGINE_OPTIONS})
