"""torchrun, ended by a signal without a traceback: `python -m waybill.launch.agent` takes torchrun's arguments."""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.run import main as torchrun

SIGNAL_EXIT_BASE = 128


def main() -> int:
    """The shell's status for an end by signal, or torchrun's own."""
    try:
        torchrun()
    except SignalException as stop:
        return SIGNAL_EXIT_BASE + stop.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
