"""What `torchrun.sh` runs on a node: checks the command line, then is torchrun's agent for this node's ranks.

`python -m waybill.launch.agent [rollout | serve] [options]`, or `engine --run-dir DIR` for a calling program.
"""

from __future__ import annotations

import os
import sys

from ..engine.config import EngineConfig
from .args import WorkerCommand, parse_worker_args
from .node_options import split_command_line
from .run_dir import ENGINE_CONFIG, read_struct
from .supervisor import threads_per_rank
from .topology import Layout

SIGNAL_EXIT_BASE = 128


def main() -> int:
    """The shell's status for an end by signal, or torchrun's own."""
    node_arguments, rest = split_command_line(sys.argv[1:])
    worker_arguments = [*rest, *node_arguments]
    # A mistake on the command line is said once, before any rank starts - and before torch is imported.
    command = parse_worker_args(worker_arguments)
    config = command.config or read_struct(str(command.run_dir), ENGINE_CONFIG, EngineConfig)
    ranks_here = Layout.of(config, command.nodes.nnodes).ranks_per_node
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank(config, ranks_here)))
    return run_agent(torchrun_arguments(command, ranks_here, worker_arguments))


def torchrun_arguments(command: WorkerCommand, ranks_here: int, worker_arguments: list[str]) -> list[str]:
    nodes = command.nodes
    logs = [] if command.run_dir is None else ["--log-dir", f"{command.run_dir}/torchrun"]
    return [
        "--nnodes",
        str(nodes.nnodes),
        "--rdzv-backend",
        "waybill",
        "--rdzv-conf",
        f"rank={nodes.node_rank}",
        "--rdzv-endpoint",
        nodes.endpoint,
        "--nproc-per-node",
        str(ranks_here),
        *logs,
        "-m",
        "waybill.launch.worker",
        *worker_arguments,
    ]


def run_agent(arguments: list[str]) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException  # noqa: PLC0415
    from torch.distributed.run import main as torchrun  # noqa: PLC0415

    from .rendezvous import register  # noqa: PLC0415

    register()
    try:
        torchrun(arguments)
    except SignalException as stop:
        return SIGNAL_EXIT_BASE + stop.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
