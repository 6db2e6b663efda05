"""What `torchrun.sh` runs on a node: checks the command line, then becomes torchrun's agent for this node's ranks.

`python -m waybill.launch.process waybill.launch.command_line [rollout | serve | route | encode] [options]`
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

from ..engine.config import EngineConfig
from .api_key import API_KEY_VARIABLE, read_api_keys, split_key
from .args import parse_worker_args
from .cpu_binding import cores_of_others, keep_to
from .imports import uncollected_imports
from .node_options import split_command_line
from .run_dir import EXIT_USAGE, RunDir
from .supervisor import thread_settings, torchrun_arguments
from .topology import Layout

# Beside what a server needs; see pyproject.toml.
ROLLOUT_NEEDS = ("matplotlib", "rich")


def hide_key() -> None:
    """Begin again without `--api-key`, which every user of the host can read in a command line, and with the key in the
    environment, which they cannot and the children inherit.

    Raises:
        ValueError: what stands there is no key.
    """
    command, key = split_key(sys.orig_argv)
    if key is not None:
        os.execve(sys.executable, [sys.executable, *command[1:]], os.environ | {API_KEY_VARIABLE: key})


def main() -> int:
    try:
        hide_key()
    except ValueError as error:
        return refuse(error)
    if sys.argv[1:2] == ["route"]:
        from .route import main as route  # noqa: PLC0415

        return route(sys.argv[2:])
    if sys.argv[1:2] == ["encode"]:
        from .encode import main as encode  # noqa: PLC0415

        return encode(sys.argv[2:])
    node_arguments, rest = split_command_line(sys.argv[1:])
    arguments = [*rest, *node_arguments]
    # A mistake is said once, before any rank starts - and before torch is imported.
    command = parse_worker_args(arguments)
    if command.config is None:
        raise ValueError("engine: is started by waybill.Engine alone")
    if command.serve is not None and command.nodes.node_rank == 0:
        try:
            read_api_keys(command.serve.api_key_file)
        except ValueError as error:
            return refuse(error)
    if command.rollout is not None and (missing := [name for name in ROLLOUT_NEEDS if find_spec(name) is None]):
        return refuse(ValueError(f"rollouts need {' and '.join(missing)}: pip install 'waybill[rollout]'"))
    ranks_here = Layout.of(command.config, command.nodes.nnodes).ranks_per_node
    try:
        settle(command.config, ranks_here)
    except ValueError as error:
        return refuse(error)
    with uncollected_imports():
        from .agent import holding_signals, run_agent, watch_signals  # noqa: PLC0415

    with holding_signals():
        run_dir = RunDir()
        watch_signals(run_dir.path)
    try:
        bind = command.config.cpu_threads_bind
        return run_agent(run_dir.path, torchrun_arguments(command.nodes, ranks_here, run_dir.path, arguments, bind))
    finally:
        run_dir.remove()


def settle(config: EngineConfig, ranks_here: int) -> None:
    """Threads and cores of this node's processes, which have them from this one.

    Raises:
        ValueError: the ranks cannot be bound as configured.
    """
    cores = cores_of_others(config, ranks_here)
    for name, value in thread_settings(config, ranks_here).items():
        os.environ.setdefault(name, value)
    if cores is not None:
        keep_to(cores)


def refuse(error: ValueError) -> int:
    print(f"torchrun.sh: error: {error}", file=sys.stderr)
    return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
