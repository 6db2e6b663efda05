"""torchrun's agent for this node, as Waybill uses it: `python -m waybill.launch.agent` takes torchrun's arguments.

It knows our rendezvous by its name, and ends by a signal without a traceback.
"""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.run import main as torchrun

from .rendezvous import register

SIGNAL_EXIT_BASE = 128


def main(arguments: list[str]) -> int:
    """The shell's status for an end by signal, or torchrun's own."""
    register()
    try:
        torchrun(arguments)
    except SignalException as stop:
        return SIGNAL_EXIT_BASE + stop.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
