"""Which layouts a number of devices allows, and what is asked of each. Pure, but for the size of a device's memory."""

from __future__ import annotations

from dataclasses import replace

from gpu_limits import Share
from gpu_plan import Plan

# By the number of devices, then tensor parallel before data parallel.
LAYOUTS = {
    "tp1": Share(1, 1, "ep"),
    "tp2-tp": Share(1, 2, "tp"),
    "tp2-ep": Share(1, 2, "ep"),
    "dp2": Share(2, 1, "ep"),
    "tp4-tp": Share(1, 4, "tp"),
    "tp4-ep": Share(1, 4, "ep"),
    "dp4": Share(4, 1, "ep"),
    "dp2-tp2": Share(2, 2, "ep"),
    "tp8-tp": Share(1, 8, "tp"),
    "tp8-ep": Share(1, 8, "ep"),
    "dp8": Share(8, 1, "ep"),
    "dp4-tp2": Share(4, 2, "ep"),
}
BASE = "tp1"
# Of a device's memory: what is neither weights nor keys and values.
OTHER_BYTES = 6 << 30


def layouts_for(wanted: list[str], num_devices: int) -> tuple[list[str], list[str]]:
    """Those of the wanted ones, or of all, that so many devices allow, and those that need more."""
    names = wanted or list(LAYOUTS)
    allowed = [name for name in names if LAYOUTS[name].world <= num_devices]
    return allowed, [name for name in names if name not in allowed]


def largest_dp(names: list[str]) -> int:
    """Of the layouts without tensor parallelism."""
    return max((LAYOUTS[name].dp for name in names if LAYOUTS[name].tp == 1), default=1)


def requests_of(total: int, dp_rank: int, dp_size: int) -> int:
    """A dp rank's of `total`: the first ones have those that are left over."""
    return total // dp_size + (dp_rank < total % dp_size)


def totals_of(name: str, plan: Plan) -> tuple[int, ...]:
    """What a layout decodes at once; one device also twice as many, as the layouts of two devices are measured there."""
    extra = [2 * batch for batch in plan.batches] if name == BASE else []
    return tuple(sorted({*plan.totals, *extra}))


def plan_of(plan: Plan, share: Share, totals: tuple[int, ...]) -> Plan:
    """With the requests of a dp rank as its batches."""
    return replace(plan, totals=totals, batches=tuple(requests_of(total, 0, share.dp) for total in totals))


def fitting_totals(plan: Plan, share: Share, totals: tuple[int, ...], memory_bytes: int) -> tuple[int, ...]:
    """Those for which a device of so much memory has room."""
    room = memory_bytes - OTHER_BYTES
    return tuple(total for total in totals if share.held_bytes(plan_of(plan, share, (total,))) <= room)
