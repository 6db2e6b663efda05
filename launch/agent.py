"""torchrun's agent for this node, as Waybill uses it: `waybill.launch.agent RUN_DIR` takes torchrun's arguments.

It knows our rendezvous by its name, holds the lifeline of the node's ranks, ends by a signal without a traceback, and
removes the folder of the run however the run ends. And it beats: stopped, it would not notice that its ranks end. Where no
program calls, it makes the table in which all processes of the node beat.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from ..engine.ipc.critical_thread import start_critical_thread
from ..engine.ipc.heartbeat import Heartbeat
from ..engine.ipc.heartbeat_table import PATH_VARIABLE, HeartbeatTable
from ..engine.ipc.lifeline import Lifeline, watch_lifeline
from .rendezvous import register
from .run_dir import EXIT_USAGE, TEMPORARY, agent_lifeline, caller_lifeline, remove_run_dir

SIGNAL_EXIT_BASE = 128
END_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def main() -> int:
    """The agent of a calling program's engine, which may be gone already."""
    run_dir, *arguments = sys.argv[1:]
    watch_signals(run_dir)
    watch_lifeline(caller_lifeline(run_dir), on_death=lambda: remove_run_dir(run_dir))
    return run_agent(run_dir, arguments)


def run_agent(run_dir: str, arguments: list[str]) -> int:
    """The shell's status for an end by signal, that of a usage error where a rank has said what is wrong with the command,
    or torchrun's own. Whoever made the folder has called `watch_signals`."""
    start_heartbeat()
    register()
    use_temporary_folder(run_dir)
    try:
        # Held until this process is gone.
        Lifeline(agent_lifeline(run_dir))
        torchrun(arguments)
    except SignalException as stop:
        return SIGNAL_EXIT_BASE + stop.sigval
    except ChildFailedError as error:
        # A rank has said the reason, which torch's report does not know.
        _, failure = error.get_first_failure()
        if failure.exitcode != EXIT_USAGE:
            raise
        return EXIT_USAGE
    finally:
        for number in END_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        remove_run_dir(run_dir)
    return 0


def use_temporary_folder(run_dir: str) -> None:
    """What the run's processes leave in the middle of their work, a compiler's files say, goes with the run's folder."""
    temporary = Path(run_dir) / TEMPORARY
    temporary.mkdir(mode=0o700, exist_ok=True)
    os.environ["TMPDIR"] = str(temporary)
    # torch makes this one when parts of it are imported, by default in the temporary folder and for good.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{run_dir}/torchinductor")


def start_heartbeat() -> None:
    """In the table of whoever started this process, or a new one."""
    # Ctrl-Z would stop the agent alone, since the ranks are in sessions of their own.
    signal.signal(signal.SIGTSTP, signal.SIG_IGN)
    path = os.environ.get(PATH_VARIABLE)
    table = HeartbeatTable.create() if path is None else HeartbeatTable.attach(path)
    os.environ.setdefault(PATH_VARIABLE, table.path)
    Heartbeat(table, "torchrun's agent", timeout_s=None)


@contextmanager
def holding_signals() -> Iterator[None]:
    """A signal that comes meanwhile comes again afterwards, for the handlers that are in place then. A mask would not do:
    it is the main thread's alone."""
    held: list[int] = []
    for number in END_SIGNALS:
        signal.signal(number, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        for each in tuple(held):
            signal.raise_signal(each)


def watch_signals(run_dir: str) -> None:
    """Until torchrun has handlers of its own, a signal would end this process with its folder left behind.

    The handler here ends it in order. It does not run while the main thread waits inside torch's store for other nodes, so
    a thread does the same. The thread may come late, when torchrun's handlers are in place; then, too, somebody has acted.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def end(number: int, frame: FrameType | None) -> None:
        remove_run_dir(run_dir)
        os._exit(SIGNAL_EXIT_BASE + number)

    def watch() -> None:
        while True:
            (number,) = os.read(reader, 1)
            if signal.getsignal(number) is end:
                end(number, None)

    for number in END_SIGNALS:
        signal.signal(number, end)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    start_critical_thread(watch, "signals")


if __name__ == "__main__":
    sys.exit(main())
