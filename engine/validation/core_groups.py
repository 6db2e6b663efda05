"""Which cores the ranks of a node are bound to, as a user writes it: `0-3|4-7`."""

from __future__ import annotations

import re

# No machine has a core of six digits; a longer number would be a longer list.
CORES = r"[0-9]{1,5}(?:-[0-9]{1,5})?"
GROUP = rf"{CORES}(?:,{CORES})*"
GROUPS = re.compile(rf"{GROUP}(?:\|{GROUP})*")


def parse_core_groups(text: str) -> tuple[frozenset[int], ...]:
    """The cores of each rank of a node, in the order of the ranks.

    Raises:
        ValueError: it is written in another way, a range has no core, or a core is in two groups.
    """
    if not GROUPS.fullmatch(text):
        raise ValueError(
            f"cpu_threads_bind={text!r}: must be cores and ranges of cores, a group for each rank of a node, as 0-3|4-7 or "
            "0,2|1,3"
        )
    groups: list[frozenset[int]] = []
    for group in text.split("|"):
        cores = frozenset(core for part in group.split(",") for core in parse_cores(text, part))
        if shared := cores & frozenset().union(*groups):
            raise ValueError(f"cpu_threads_bind={text!r}: core {min(shared)} must be in one group alone")
        groups.append(cores)
    return tuple(groups)


def parse_cores(text: str, part: str) -> range:
    first, _, last = part.partition("-")
    cores = range(int(first), int(last or first) + 1)
    if not cores:
        raise ValueError(f"cpu_threads_bind={text!r}: {part}: a range must not end below its first core")
    return cores


def check_core_groups(text: str, num_threads: int | None) -> None:
    """
    Raises:
        ValueError: `parse_core_groups` refuses it, or a rank would have more threads than cores.
    """
    for number, cores in enumerate(parse_core_groups(text)):
        if num_threads is not None and num_threads > len(cores):
            raise ValueError(
                f"num_threads={num_threads}: must be at most {len(cores)}, the cores of group {number} of "
                f"cpu_threads_bind={text!r}"
            )
