"""When the leaders of an engine committed their steps: logged inside the ranks, read by the benchmark.

The log stays in the rank's memory and goes to a file when the engine is asked for its state, so between steps nothing is
written. Times are those of the monotonic clock, which all processes of a host share.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from waybill.engine.scheduler.scheduler import Scheduler


class StepEntry(msgspec.Struct, frozen=True, array_like=True):
    """One forward of one leader. All leaders take part in every forward, so `step` counts alike on all of them."""

    step: int
    committed_s: float
    # Tokens of its own in the step, those sampled, and the requests that it finished.
    num_tokens: int
    num_sampled: int
    finished: list[str]


def log_file(folder: str, dp_rank: int) -> Path:
    return Path(folder) / f"leader{dp_rank}.steps"


@dataclass
class StepTap:
    """Listens to a leader's commits."""

    scheduler: Scheduler[Any]
    file: Path
    clock: Any
    _entries: list[StepEntry] = field(default_factory=list)
    _num_steps: int = 0

    def install(self) -> None:
        commit, state = self.scheduler.committer.commit, self.scheduler.state

        def tapped_commit(planned: Any, result: Any) -> Any:
            committed = commit(planned, result)
            self._entries.append(
                StepEntry(
                    self._num_steps,
                    self.clock(),
                    sum(item.scheduled.num_tokens for item in planned),
                    len(committed.outputs),
                    [finished.rid for finished in committed.finished],
                )
            )
            self._num_steps += 1
            return committed

        def state_and_flush(*, check_pages: bool = True) -> dict[str, int | float | str]:
            self.flush()
            return state(check_pages=check_pages)

        self.scheduler.committer.commit = tapped_commit  # type: ignore[method-assign]
        self.scheduler.state = state_and_flush  # type: ignore[method-assign]

    def flush(self) -> None:
        """Append what was logged since the last time, as one message with its length before it."""
        entries, self._entries = self._entries, []
        data = msgspec.msgpack.encode(entries)
        with self.file.open("ab") as file:
            file.write(len(data).to_bytes(8, "little") + data)


@dataclass
class StepLogReader:
    """The benchmark's end of one leader's log."""

    file: Path
    _offset: int = 0

    def take(self) -> list[StepEntry]:
        """What has been flushed since the last call."""
        entries: list[StepEntry] = []
        data = self.file.read_bytes()
        while self._offset < len(data):
            first = self._offset + 8
            end = first + int.from_bytes(data[self._offset : first], "little")
            entries += msgspec.msgpack.decode(data[first:end], type=list[StepEntry])
            self._offset = end
        return entries
