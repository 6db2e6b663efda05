"""Starts processes, watches them, and ends them: a node's children, and the torchrun agent of a Python caller."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ..engine.config import EngineConfig
from ..engine.disaggregation.place import RoutesPlace
from ..engine.ipc.critical_thread import start_critical_thread
from ..engine.ipc.heartbeat import Heartbeat
from ..engine.ipc.heartbeat_table import PATH_VARIABLE, HeartbeatTable
from ..engine.ipc.lifeline import Lifeline
from ..engine.ipc.sockets import Endpoint
from ..engine.output.config import OutputProcessorConfig
from ..engine.routing.claims import claim_prefix
from ..engine.validation.core_groups import parse_core_groups
from .cpu_binding import MODULE as BOUND
from .cpu_binding import cores_of_others, running_on
from .node_options import RENDEZVOUS_BACKEND, NodeOptions, check_partners
from .run_dir import ENGINE_CONFIG, OUTPUT_PROCESSOR_CONFIG, RunDir, caller_lifeline, remove_run_dir, write_struct
from .topology import Addresses, Layout, one_node_addresses

logger = logging.getLogger(__name__)

# What runs any of them.
PROCESS = "waybill.launch.process"
EXIT_CHILD_DIED = 4
TERMINATE_GRACE_S = 5.0
LOG_TAIL_BYTES = 4000
# Looks of a thread at a barrier before it sleeps: some tens of microseconds.
SPIN_COUNT = 3000


class NodeChildren:
    """What a node's first rank starts: the node's output processor, if it has one, and on node 0 of a run without a calling
    program a frontend."""

    def __init__(self, config: EngineConfig, layout: Layout, node: int, addresses: Addresses) -> None:
        self._config = config
        self._layout = layout
        self._node = node
        self._addresses = addresses
        self._lifeline = Lifeline(addresses.lifeline)
        # Theirs are the cores of torchrun's agent, not of the rank that starts them.
        self._cores = None if config.cpu_threads_bind is None else os.sched_getaffinity(os.getppid())
        self._stopping = False
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def start_output_processor(self, transfer: RoutesPlace | None = None) -> None:
        """The one of this node."""
        config, addresses, node = self._config, self._addresses, self._node
        dp_ranks = self._layout.dp_ranks_of(node)
        processor = OutputProcessorConfig(
            records_address=addresses.records[node],
            frontend_address=addresses.frontend,
            queries_address=addresses.queries[node],
            tokenizer_path=config.tokenizer_path or config.model_path,
            lifeline_path=addresses.lifeline,
            first_dp_rank=dp_ranks[0],
            num_dp_ranks=len(dp_ranks),
            claim_prefix=claim_prefix(node, self._layout.num_processors),
            claim_budget_bytes=config.claim_budget_bytes,
            claim_ttl_s=config.claim_ttl_s,
            heartbeat_timeout_s=config.heartbeat_timeout_s,
            log_level=config.log_level,
            transfer=transfer,
        )
        file = write_struct(addresses.run_dir, OUTPUT_PROCESSOR_CONFIG, processor)
        listeners = [addresses.records[node], addresses.queries[node]]
        if transfer is not None and transfer.listen is not None:
            listeners.append(transfer.listen)
        self.start("output processor", ["waybill.engine.output.output_processor", "--config", str(file)], listeners)

    def start(self, name: str, module_and_args: list[str], listeners: Sequence[Endpoint] = ()) -> None:
        """Run a module as a child and watch it: if it dies while the run goes on, this rank dies, and with it the run.
        `listeners` are the endpoints that it binds, whose listening sockets go over to it."""
        fds = [endpoint.fd for endpoint in listeners if endpoint.fd >= 0]
        with running_on(self._cores):
            child = subprocess.Popen(
                [sys.executable, "-m", PROCESS, *module_and_args], stdin=subprocess.DEVNULL, pass_fds=fds
            )
        for fd in fds:
            os.close(fd)
        self._children[name] = child
        start_critical_thread(lambda: self._watch(name, child), f"watch {name}")

    def _watch(self, name: str, child: subprocess.Popen[bytes]) -> None:
        code = child.wait()
        if self._stopping or code == 0:
            return
        logger.error("the %s ended with status %d: stopping the run", name, code)
        remove_run_dir(self._addresses.run_dir)
        os._exit(code if 0 < code < 128 else EXIT_CHILD_DIED)

    def wait(self, name: str) -> int:
        """Wait for a child that ends by itself; its exit status."""
        return self._children[name].wait()

    def stop(self) -> None:
        """End what still runs."""
        self._stopping = True
        self._lifeline.cut()
        for child in self._children.values():
            end_process(child)


def end_process(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and SIGKILL after a grace period; by its process id alone."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(TERMINATE_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


class EngineProcess:
    """The ranks of an engine, under torchrun, as children of a calling program.

    `on_exit(message)` is called from a thread when the agent ends without having been asked to.
    """

    def __init__(self, config: EngineConfig, on_exit: Callable[[str], None]) -> None:
        check_partners(config, num_nodes=1)
        layout = Layout.of(config, num_nodes=1)
        # The caller's own process stays where it is.
        self._cores = cores_of_others(config, layout.ranks_per_node)
        self._on_exit = on_exit
        self._ending = False
        self._folder = RunDir()
        self.run_dir = self._folder.path
        try:
            self._start(config, layout)
        except BaseException:
            self._folder.remove()
            raise

    def _start(self, config: EngineConfig, layout: Layout) -> None:
        """
        Raises:
            ValueError: the folder's path leaves no room for a socket's name.
        """
        self.addresses = one_node_addresses(self.run_dir, layout)
        self._lifeline = Lifeline(caller_lifeline(self.run_dir))
        # Held open: who notices the end first removes the folder, and what the ranks said last must outlive it.
        self._log = (Path(self.run_dir) / "engine.log").open("w+b")
        write_struct(self.run_dir, ENGINE_CONFIG, config)
        self._heartbeats = HeartbeatTable.create()
        settings = thread_settings(config, config.world_size)
        environment = settings | dict(os.environ) | {PATH_VARIABLE: self._heartbeats.path}
        with running_on(self._cores):
            self._agent = subprocess.Popen(
                agent_command(config.world_size, self.run_dir, config.cpu_threads_bind),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env=environment,
                # An interrupt at the terminal is for the caller; the ranks follow when it ends.
                start_new_session=True,
            )
        start_critical_thread(self._watch, "watch engine", self._fail)
        # Only an eye on the others: a user may stop his program for as long as he likes.
        self._heartbeat = Heartbeat(self._heartbeats, None, config.heartbeat_timeout_s, on_failure=self._fail)

    def _fail(self, reason: str) -> None:
        """A thread that watches the engine has failed: end it, since nobody would notice any more if it ended."""
        self._agent.kill()
        self._on_exit(reason)

    def _watch(self) -> None:
        code = self._agent.wait()
        if not self._ending:
            self._on_exit(f"the engine's processes ended with status {code}\n{self.log_tail()}")

    @property
    def is_running(self) -> bool:
        return self._agent.poll() is None

    def log_tail(self) -> str:
        """The end of what the ranks wrote."""
        size = os.fstat(self._log.fileno()).st_size
        first = max(0, size - LOG_TAIL_BYTES)
        return os.pread(self._log.fileno(), LOG_TAIL_BYTES, first).decode(errors="replace")

    def wait(self, timeout_s: float) -> None:
        """Give the ranks time to leave by themselves, after they were told to."""
        self._ending = True
        try:
            self._agent.wait(timeout_s)
        except subprocess.TimeoutExpired:
            logger.warning("the engine did not stop within %s s: ending it", timeout_s)

    def terminate(self) -> None:
        """End everything and remove the run's folder."""
        self._ending = True
        self._heartbeat.stop_watching()
        self._lifeline.cut()
        end_process(self._agent)
        self._heartbeats.close()
        self._log.close()
        self._folder.remove()


def threads_per_rank(config: EngineConfig, ranks_here: int) -> int:
    """Unless configured: the cores of this process, shared by so many ranks."""
    return config.num_threads or max(1, len(os.sched_getaffinity(0)) // ranks_here)


def thread_settings(config: EngineConfig, ranks_here: int) -> dict[str, str]:
    """Environment variables of OpenMP for the ranks of this node, where the user has not set them."""
    threads = threads_per_rank(config, ranks_here)
    if config.cpu_threads_bind is not None:
        # Alike for all ranks, which set their own number afterwards.
        threads = config.num_threads or min(map(len, parse_core_groups(config.cpu_threads_bind)))
    return {
        "OMP_NUM_THREADS": str(threads),
        # GNU's threads spin for each other for milliseconds, on cores that frontend and output processor need, too.
        "GOMP_SPINCOUNT": str(SPIN_COUNT),
    }


def agent_command(world_size: int, run_dir: str, cpu_threads_bind: str | None = None) -> list[str]:
    """The agent of a calling program's engine, on one node."""
    arguments = torchrun_arguments(NodeOptions(), world_size, run_dir, ["engine"], cpu_threads_bind)
    return [sys.executable, "-m", PROCESS, "waybill.launch.agent", run_dir, *arguments]


def torchrun_arguments(
    nodes: NodeOptions,
    ranks_here: int,
    run_dir: str,
    worker_arguments: list[str],
    cpu_threads_bind: str | None = None,
) -> list[str]:
    """What tells torchrun to start the ranks of this node. What it writes itself goes to the run's folder."""
    return [
        *("--nnodes", str(nodes.nnodes)),
        *("--rdzv-backend", RENDEZVOUS_BACKEND),
        *("--rdzv-conf", f"rank={nodes.node_rank}"),
        *("--rdzv-endpoint", nodes.endpoint),
        *("--nproc-per-node", str(ranks_here)),
        *("--log-dir", f"{run_dir}/torchrun"),
        *(() if cpu_threads_bind is None else ("-m", BOUND, cpu_threads_bind)),
        *("-m", PROCESS, "waybill.launch.worker", "--run-dir", run_dir),
        *worker_arguments,
    ]
