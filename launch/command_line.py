"""What `torchrun.sh` runs on a node: checks the command line, then becomes torchrun's agent for this node's ranks.

`python -m waybill.launch.command_line [rollout | serve] [options]`
"""

from __future__ import annotations

import os
import sys

from .args import parse_worker_args
from .node_options import split_command_line
from .run_dir import RunDir
from .supervisor import threads_per_rank, torchrun_arguments
from .topology import Layout


def main() -> int:
    node_arguments, rest = split_command_line(sys.argv[1:])
    arguments = [*rest, *node_arguments]
    # A mistake is said once, before any rank starts - and before torch is imported.
    command = parse_worker_args(arguments)
    if command.config is None:
        raise ValueError("engine: is started by waybill.Engine alone")
    ranks_here = Layout.of(command.config, command.nodes.nnodes).ranks_per_node
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank(command.config, ranks_here)))
    from .agent import run_agent  # noqa: PLC0415

    run_dir = RunDir()
    try:
        return run_agent(run_dir.path, torchrun_arguments(command.nodes, ranks_here, run_dir.path, arguments))
    finally:
        run_dir.remove()


if __name__ == "__main__":
    sys.exit(main())
