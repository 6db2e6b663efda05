"""All rules, in the order in which they are run: those that pause the server come last."""

from __future__ import annotations

from collections.abc import Sequence

from .envelope_rules import ENVELOPE_RULES
from .interruption_rules import INTERRUPTION_RULES
from .row_rules import ROW_RULES
from .rule import Rule
from .slice_rules import SLICE_RULES
from .stream_rules import STREAM_RULES
from .turn_rules import TURN_RULES

RULES: tuple[Rule, ...] = (
    *ROW_RULES,
    *SLICE_RULES,
    *STREAM_RULES,
    *TURN_RULES,
    *ENVELOPE_RULES,
    *INTERRUPTION_RULES,
)


def rules_named(names: Sequence[str]) -> list[Rule]:
    """
    Raises:
        ValueError: there is no rule of a name.
    """
    known = {rule.name: rule for rule in RULES}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"--only {unknown[0]}: is no rule, must be of {', '.join(known)}")
    return [rule for rule in RULES if rule.name in names]
