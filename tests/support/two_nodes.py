"""Two nodes on one machine: two network namespaces with a cable between them, or, where those are not permitted, two
loopback addresses. Each node runs its own `./torchrun.sh`, as on two hosts."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil

from .server_process import ROOT, ServerProcess

CLONE_NEWNET = 0x40000000
NAMESPACE_TIMEOUT_S = 5.0
LEAVE_TIMEOUT_S = 30.0
# Holds a new network namespace until it, or the thread that starts it, is gone.
HOLD = ("setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sleep", "infinity")


class TwoNodes:
    """`addresses[k]` is node k's own. Ends everything it started on `close`."""

    def __init__(self) -> None:
        self._holders: list[subprocess.Popen[bytes]] = []
        self.addresses = ["10.213.77.1", "10.213.77.2"]
        self.has_namespaces = self._make_namespaces()
        if not self.has_namespaces:
            self.addresses = ["127.0.0.1", "127.0.0.2"]

    def _make_namespaces(self) -> bool:
        """A namespace lives as long as the process that holds it; nothing is left when a test run is killed."""
        if os.geteuid() != 0:
            return False
        here = os.readlink("/proc/self/ns/net")
        for _ in self.addresses:
            self._holders.append(subprocess.Popen(HOLD, stdin=subprocess.DEVNULL))
        deadline = time.monotonic() + NAMESPACE_TIMEOUT_S
        while any(namespace_of(holder) in (None, here) for holder in self._holders):
            if time.monotonic() > deadline or any(holder.poll() is not None for holder in self._holders):
                return False
            time.sleep(0.01)
        first, second = (holder.pid for holder in self._holders)
        commands = [f"ip link add node0 netns {first} type veth peer name node1 netns {second}"]
        for index, (holder, address) in enumerate(zip(self._holders, self.addresses, strict=True)):
            inside = f"nsenter --net=/proc/{holder.pid}/ns/net ip"
            commands += [f"{inside} addr add {address}/30 dev node{index}", f"{inside} link set node{index} up"]
            commands += [f"{inside} link set lo up"]
        return all(subprocess.run(c.split(), capture_output=True).returncode == 0 for c in commands)

    @contextmanager
    def cut_cable(self) -> Iterator[None]:
        """Inside, each node is gone without a word, as the other sees it."""
        command = [*self.prefix(1), "ip", "link", "set", "node1"]
        subprocess.run([*command, "down"], check=True)
        try:
            yield
        finally:
            subprocess.run([*command, "up"], check=True)

    def prefix(self, node: int) -> list[str]:
        """What runs a command on a node: in its namespace, on its half of the cores."""
        cores = sorted(os.sched_getaffinity(0))
        own = cores[node::2] or cores
        pinned = ["taskset", "--cpu-list", ",".join(map(str, own))]
        return [*pinned, "nsenter", f"--net=/proc/{self._holders[node].pid}/ns/net"] if self.has_namespaces else pinned

    @contextmanager
    def inside(self, node: int) -> Iterator[None]:
        """This thread's new sockets are the node's."""
        if not self.has_namespaces:
            yield
            return
        # Opened before: what it names is the namespace in which the thread is.
        with open("/proc/thread-self/ns/net") as here, open(f"/proc/{self._holders[node].pid}/ns/net") as there:
            set_namespace(there)
            try:
                yield
            finally:
                set_namespace(here)

    def options(self, node: int, port: int) -> list[str]:
        options = ["--nnodes", "2", "--node-rank", str(node), "--rdzv-endpoint", f"{self.addresses[0]}:{port}"]
        return options if self.has_namespaces else [*options, "--node-address", self.addresses[node]]

    def free_port(self) -> int:
        """A port of node 0 for the agents to meet at; an operator would choose one."""
        with self.inside(0), socket.create_server((self.addresses[0], 0)) as listener:
            return int(listener.getsockname()[1])

    def close(self) -> None:
        for holder in self._holders:
            holder.kill()
            holder.wait()


def namespace_of(process: subprocess.Popen[bytes]) -> str | None:
    try:
        return os.readlink(f"/proc/{process.pid}/ns/net")
    except OSError:
        return None


def set_namespace(namespace: IO[str]) -> None:
    """Move this thread, and no other, into a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), f"setns {namespace.name}")


class TwoNodeServer:
    """`./torchrun.sh serve` on two nodes; `url` is to be used `inside` node 0."""

    def __init__(self, nodes: TwoNodes, *options: str) -> None:
        self._nodes = nodes
        port = nodes.free_port()
        torchrun = str(ROOT / "torchrun.sh")
        self.second = subprocess.Popen(
            [*nodes.prefix(1), torchrun, "serve", *nodes.options(1, port), *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            self.first = ServerProcess(*nodes.options(0, port), *options, prefix=nodes.prefix(0))
        except BaseException:
            self.second.kill()
            self.second.wait()
            raise
        self.url = self.first.url

    def processes(self, node: int) -> list[psutil.Process]:
        """What runs on a node, its agent last."""
        agent = psutil.Process((self.first.process if node == 0 else self.second).pid)
        return [*agent.children(recursive=True), agent]

    def stop(self) -> None:
        """An operator stops node 0; both end in order, and nothing is left."""
        started = [process for node in (0, 1) for process in self.processes(node)]
        self.first.stop()
        assert self.second.wait(LEAVE_TIMEOUT_S) == 0, self.second.stdout and self.second.stdout.read()
        _, alive = psutil.wait_procs(started, timeout=5.0)
        assert not alive, f"left behind: {alive}"

    def kill(self) -> None:
        """For a test that has failed or has killed a part of it: whatever is left."""
        for process in (self.first.process, self.second):
            try:
                left = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
            except psutil.NoSuchProcess:
                continue
            for one in left:
                one.kill()
            process.wait()


def rollout_command(*options: str) -> list[str]:
    return [str(ROOT / "torchrun.sh"), "rollout", "--json", *options]


def two_node_rollout(nodes: TwoNodes, folder: Path, *options: str, timeout_s: float = 150.0) -> str:
    """The last line that node 0 says of a rollout on both; both must succeed."""
    port = nodes.free_port()
    agents = [
        subprocess.Popen(
            [*nodes.prefix(node), *rollout_command("--out", str(folder), *nodes.options(node, port), *options)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for node in (0, 1)
    ]
    outputs = []
    try:
        for agent in agents:
            outputs.append(agent.communicate(timeout=timeout_s)[0])
    finally:
        for agent in agents:
            if agent.poll() is None:
                agent.terminate()
                agent.wait()
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(outputs)
    return outputs[0].splitlines()[-1]
