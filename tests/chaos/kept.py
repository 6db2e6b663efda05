"""What came of a trial between processes that may die, and a file of such results, by which a campaign can go on later."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass
class Result:
    scene: str
    seed: int
    kind: str
    # How the processes reach each other.
    transport: str
    # Nobody may wait longer.
    bound_s: float
    what: str = ""
    num_right: int = 0
    num_errors: int = 0
    num_left: int = 0
    num_by_near_ties: int = 0
    wait_s: float = 0.0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)

    def line(self) -> str:
        return (
            f"{'FAIL' if self.faults else 'ok':4} {self.scene}, seed {self.seed}, {self.transport}: "
            f"{self.kind}: {self.what}; {self.num_right} right, {self.num_errors} errors, {self.num_left} left; "
            f"waited {self.wait_s:.1f} of {self.bound_s:.0f} s; {self.seconds:.1f} s"
        )


class Kept:
    """Results by scene and seed, in a file of a line each if there is one; a later line replaces an earlier one."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._results: dict[tuple[str, int], Result] = {}
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                result = Result(**json.loads(line))
                self._results[result.scene, result.seed] = result

    def seeds(self, scene: str) -> set[int]:
        return {seed for name, seed in self._results if name == scene}

    def results(self, scene: str) -> list[Result]:
        return [result for (name, _), result in sorted(self._results.items()) if name == scene]

    def add(self, result: Result) -> None:
        self._results[result.scene, result.seed] = result
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")
