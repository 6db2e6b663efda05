"""What the ranks tell each other about an operation that all of them did, so that all draw the same conclusion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from ...parallel.collectives import gather_bytes
from ...parallel.mesh import Axis


class RankReport(msgspec.Struct, frozen=True, array_like=True):
    """One rank's outcome: why it failed, if it did, whether it has changed weights, and what it was asked for."""

    error: str | None = None
    has_changed: bool = False
    payload: bytes = b""


@dataclass(frozen=True)
class Outcome:
    """What came of an operation on all ranks, in words, and with what was asked for."""

    success: bool
    message: str = ""
    # What the weights are called from now on, when an update has become complete.
    weight_version: str | None = None
    payload: bytes = b""


@dataclass(frozen=True)
class Verdict:
    """The outcome on all ranks."""

    reports: Sequence[RankReport]

    @property
    def error(self) -> str | None:
        """The first rank's that failed, with its number where only some failed."""
        errors = [(rank, report.error) for rank, report in enumerate(self.reports) if report.error is not None]
        if not errors:
            return None
        rank, error = errors[0]
        return error if len(errors) == len(self.reports) else f"rank {rank}: {error}"

    @property
    def any_changed(self) -> bool:
        return any(report.has_changed for report in self.reports)


def exchange_reports(report: RankReport, world: Axis) -> Verdict:
    """Waits for all ranks."""
    decoder = msgspec.msgpack.Decoder(RankReport)
    return Verdict([decoder.decode(data) for data in gather_bytes(msgspec.msgpack.encode(report), world)])
