"""Checksums of weights kept, to tell later whether the weights are the same: a trainer's check that an update brought what
was there before."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from ..control.operations import CheckWeights
from .report import Outcome

MAX_NAMES_SHOWN = 3


class WeightSnapshot:
    """All ranks keep the same, from checksums that are the same on all."""

    def __init__(self) -> None:
        self._kept: Mapping[str, str] | None = None

    def check(self, op: CheckWeights, checksums: Mapping[str, str]) -> Outcome:
        """What `op` asks of the weights that have these checksums.

        Raises:
            ValueError: there is nothing to compare with.
        """
        skipped = op.skip_tensor_list or []
        chosen = {name: one for name, one in checksums.items() if not any(part in name for part in skipped)}
        if op.action == "snapshot":
            self._kept = dict(checksums)
        if op.action != "compare":
            return Outcome(True, f"{op.action} of {len(chosen)} tensors", payload=msgspec.json.encode(chosen))
        if self._kept is None:
            raise ValueError("action='compare': needs a snapshot, ask for action='snapshot' first")
        different = [name for name, checksum in chosen.items() if self._kept[name] != checksum]
        if different:
            names = ", ".join(different[:MAX_NAMES_SHOWN]) + (" ..." if len(different) > MAX_NAMES_SHOWN else "")
            return Outcome(False, f"weights: {len(different)} of {len(chosen)} tensors have changed: {names}")
        return Outcome(True, f"{len(chosen)} tensors are those of the snapshot", payload=msgspec.json.encode(chosen))
