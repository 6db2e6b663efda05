"""What came of a trial."""

from __future__ import annotations

from dataclasses import dataclass, field

from .deck import Trial


@dataclass
class Outcome:
    """`wait_s` is the longest wait of anybody, to be compared with `bound_s`."""

    trial: Trial
    what: str = ""
    result: str = ""
    wait_s: float = 0.0
    bound_s: float = 0.0
    seconds: float = 0.0
    num_answers: int = 0
    num_near_ties: int = 0
    skipped: bool = False
    faults: list[str] = field(default_factory=list)
    # What the service logged last, where something is wrong.
    log: str = ""

    def line(self) -> str:
        mark = "FAIL" if self.faults else "skip" if self.skipped else "ok"
        trial = self.trial
        moment = f" ({trial.moment})" if trial.moment else ""
        return (
            f"{mark:4} seed {trial.seed:<4} {trial.shape!s:26} {trial.kind}{moment}: {self.what}; {self.result}; "
            f"waited {self.wait_s:.1f} of {self.bound_s:.0f} s; {self.seconds:.1f} s"
        )
