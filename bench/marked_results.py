"""How a benchmark's script tells its results to the one that has started it: a marked line of JSON each.

One that fails or takes too long is said to; what it printed before is kept.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

MARK = "RESULT "
LAST_WORDS = 400


def say(kind: str, **values: Any) -> None:
    print(MARK + json.dumps({"kind": kind, **values}), flush=True)


@dataclass
class Found:
    """What a script printed, by kind of result. Its last one is `done`."""

    name: str
    results: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    failure: str = ""

    def of(self, kind: str) -> list[dict[str, Any]]:
        return self.results.get(kind, [])


NOT_RUN = "not run"


def load_kept(file: Path | None) -> dict[str, Found]:
    """What earlier calls have kept, by name."""
    if file is None or not file.exists():
        return {}
    return {name: Found(name, **each) for name, each in json.loads(file.read_text()).items()}


def keep(file: Path | None, kept: dict[str, Found]) -> None:
    if file is not None:
        file.write_text(json.dumps({name: {"results": f.results, "failure": f.failure} for name, f in kept.items()}))


def start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    )


def kill_all(pid: int) -> None:
    """A process and all that it has started."""
    agent = psutil.Process(pid)
    for process in (agent, *agent.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def read_results(name: str, child: subprocess.Popen[str], timeout_s: float) -> Found:
    """Until it ends, with its time at the latest."""
    found = Found(name)
    timer = threading.Timer(timeout_s, kill_all, (child.pid,))
    timer.start()
    began, last = time.monotonic(), deque[str](maxlen=LAST_WORDS)
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith(MARK):
            result = json.loads(line.removeprefix(MARK))
            found.results.setdefault(result.pop("kind"), []).append(result)
            print(f"{name}, {time.monotonic() - began:.0f} s: {line.removeprefix(MARK).rstrip()}", flush=True)
        else:
            last.append(line.rstrip())
    status = child.wait()
    timer.cancel()
    if not found.of("done"):
        late = time.monotonic() - began >= timeout_s
        found.failure = f"killed after {timeout_s:g} s" if late else f"exit status {status}"
        print(f"{name}: {found.failure}", *last, sep="\n", flush=True)
    return found
