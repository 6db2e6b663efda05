"""One of Waybill's processes, from its first import to its end: `python -m waybill.launch.process MODULE [options]`.

When the module's `main` has returned, threads were joined and whatever wanted to be called at the end was called, the
system takes the memory back. Python itself would take it apart object by object, which with torch lasts as long as many of
its imports.
"""

from __future__ import annotations

import atexit
import importlib
import os
import sys

from .imports import uncollected_imports


def main() -> int:
    """What the module's `main` returns: the process' exit status."""
    status: list[int] = []

    def leave() -> None:
        # An error that was raised ends as errors do.
        if status:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(status[0])

    # What is registered first is called last.
    atexit.register(leave)
    name, *arguments = sys.argv[1:]
    with uncollected_imports():
        module = importlib.import_module(name)
    sys.argv = [str(module.__file__), *arguments]
    status.append(module.main() or 0)
    return status[0]


if __name__ == "__main__":
    sys.exit(main())
