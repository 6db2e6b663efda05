"""Runs over several nodes before anything is started: options, who is where, who binds what, who hears of an end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from zmq.utils import z85

from waybill.engine.config import EngineConfig
from waybill.launch.exchange import (
    RunSecrets,
    Store,
    exchange_addresses,
    node_address_towards,
    open_listener,
    share_secrets,
)
from waybill.launch.network_interface import interface_of
from waybill.launch.node_lifeline import MAX_UNAUTHENTICATED, NodeLifeline
from waybill.launch.node_options import LOCAL_ENDPOINT, NodeOptions, run_secret, split_command_line
from waybill.launch.topology import Addresses, Layout

ORPHANED = 3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"nnodes": 0}, "--nnodes 0: must be at least 1"),
        ({"nnodes": 2}, "--rdzv-endpoint: --nnodes above 1 needs it"),
        ({"nnodes": 2, "node_rank": 2, "rdzv_endpoint": "a:1"}, r"--node-rank 2: must lie in 0 \.\. 1"),
        ({"node_rank": -1}, r"--node-rank -1: must lie in 0 \.\. 0"),
        ({"rdzv_endpoint": "host"}, "--rdzv-endpoint host: must be HOST:PORT"),
        ({"rdzv_endpoint": "host:0"}, r"must lie in 1 \.\. 65535"),
        ({"rdzv_endpoint": "host:70000"}, r"must lie in 1 \.\. 65535"),
        ({"node_address": "0.0.0.0"}, "--node-address 0.0.0.0: must be one address of this node"),
        ({"node_address": "::"}, "--node-address ::: must be one address"),
        ({"node_address": "eth0"}, "--node-address eth0: must be an IPv4 or IPv6 address"),
    ],
)
def test_wrong_node_options_are_named_with_their_range(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        NodeOptions(**fields)


def test_one_node_meets_on_loopback() -> None:
    assert NodeOptions().endpoint == LOCAL_ENDPOINT == "127.0.0.1:0"
    assert NodeOptions(nnodes=2, node_rank=1, rdzv_endpoint="[fe80::1]:29500").endpoint == "[fe80::1]:29500"


@pytest.mark.parametrize(
    ("line", "nodes", "rest"),
    [
        ("", "", "rollout"),
        ("--turns 2", "", "rollout --turns 2"),
        (
            "--nnodes 2 --node-rank 1 --rdzv-endpoint h:1 serve --tp 2",
            "--nnodes 2 --node-rank 1 --rdzv-endpoint h:1",
            "serve --tp 2",
        ),
        ("serve --tp 2 --nnodes=2 --port 1", "--nnodes 2", "serve --tp 2 --port 1"),
        ("--nnodes 2 --turns 3", "--nnodes 2", "rollout --turns 3"),
    ],
)
def test_node_options_may_stand_anywhere(line: str, nodes: str, rest: str) -> None:
    assert split_command_line(line.split()) == (nodes.split(), rest.split())


@pytest.mark.parametrize(
    ("fields", "num_nodes", "words"),
    [
        ({"dp_size": 3}, 2, "--nnodes 2: must divide --dp 3 times --tp 1"),
        (
            {"tp_size": 2, "output_processors": "node"},
            2,
            "--output-processors node: a dp group of --tp 2 ranks would span",
        ),
        ({"dp_size": 3, "tp_size": 4, "output_processors": "node"}, 2, "--tp must divide the ranks of a node"),
    ],
)
def test_ranks_that_cannot_be_spread_are_refused(fields: dict[str, object], num_nodes: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Layout.of(EngineConfig(model_path="m", **fields), num_nodes)


def test_each_node_files_for_its_own_dp_ranks() -> None:
    engine, node = Layout(4, 2, 2), Layout(4, 2, 2, "node")
    assert [engine.processor_of(dp_rank) for dp_rank in range(4)] == [0, 0, 0, 0]
    assert [node.processor_of(dp_rank) for dp_rank in range(4)] == [0, 0, 1, 1]
    assert engine.dp_ranks_of(0) == (0, 1, 2, 3)
    assert [node.dp_ranks_of(processor) for processor in (0, 1)] == [(0, 1), (2, 3)]
    assert Layout(1, 2, 1, "node").num_processors == 1, "one node, one processor: both modes are the same"


@pytest.mark.parametrize(
    ("layout", "between_nodes"),
    [
        (Layout(2, 2, 1), set()),
        (Layout(2, 1, 2), {"frontend", "leader1", "records0"}),
        (Layout(2, 1, 2, "node"), {"frontend", "leader1", "queries1"}),
        # The leader is on node 0 with everybody else but its peer.
        (Layout(1, 2, 2), {"frontend", "peer0.1"}),
        (Layout(2, 4, 4), {"peer0.2", "peer0.3", "peer1.2", "peer1.3", "frontend", "leader1", "records0"}),
    ],
)
def test_only_what_other_nodes_use_is_on_the_network(layout: Layout, between_nodes: set[str]) -> None:
    assert {place.name for place in layout.sockets() if not place.is_local} == between_nodes


class FakeStore:
    """`get` waits, as torch's does."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()

    def set(self, key: str, value: bytes) -> None:
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def values(self) -> list[bytes]:
        return list(self._values.values())

    def get(self, key: str) -> bytes:
        with self._changed:
            assert self._changed.wait_for(lambda: key in self._values, timeout=5.0)
            return self._values[key]


def on_all_ranks(layout: Layout, function: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=function, args=(rank,)) for rank in range(layout.world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_ranks_learn_where_each_socket_listens() -> None:
    layout, store = Layout(2, 2, 2, "node"), FakeStore()
    seen: dict[int, Addresses] = {}

    def rank_of_the_run(rank: int) -> None:
        checked: Store = store
        node = layout.node_of(rank)
        keys = share_secrets(checked, rank, None).keys
        seen[rank] = exchange_addresses(checked, layout, rank, f"/tmp/run{node}", f"127.0.0.{node + 1}", keys)

    on_all_ranks(layout, rank_of_the_run)
    assert seen[0].peers[0][0].address == "ipc:///tmp/run0/peer0.1"
    assert seen[3].peers[1][0].address == "ipc:///tmp/run1/peer1.1"
    assert seen[1].leaders[1].address == seen[2].leaders[1].address
    assert seen[1].leaders[1].address.startswith("tcp://127.0.0.2:")
    assert seen[3].frontend.address.startswith("tcp://127.0.0.1:")
    for addresses in seen.values():
        for endpoint in (addresses.frontend, *addresses.leaders, *addresses.records, *addresses.queries):
            assert (endpoint.keys is not None) == endpoint.address.startswith("tcp://")
    # A port is bound before anybody hears of it, and by the rank in whose name it is alone.
    assert seen[2].leaders[1].fd >= 0 and seen[1].leaders[1].fd == -1
    bound = socket.socket(fileno=os.dup(seen[2].leaders[1].fd))
    assert "tcp://{}:{}".format(*bound.getsockname()) == seen[0].leaders[1].address
    bound.close()
    for endpoint in (seen[0].frontend, seen[2].leaders[1], seen[2].queries[1]):
        os.close(endpoint.fd)


SECRET = b"a secret of the operator's"


def test_keys_of_a_secret_do_not_travel() -> None:
    store, layout = FakeStore(), Layout(2, 1, 2)
    seen: dict[int, RunSecrets] = {}

    def rank_of_the_run(rank: int) -> None:
        seen[rank] = share_secrets(store, rank, SECRET)

    on_all_ranks(layout, rank_of_the_run)
    assert seen[0] == seen[1] == RunSecrets.derive(SECRET) != RunSecrets.derive(SECRET + b"s")
    told = b"".join(store.values())
    keys = seen[0].keys
    for part in (keys.server_secret, keys.client_secret, keys.server_public, keys.client_public, seen[0].token, SECRET):
        assert part not in told
    parts = {keys.server_secret, keys.client_secret, keys.server_public, keys.client_public, z85.encode(seen[0].token)}
    assert len(parts) == 5


@pytest.mark.parametrize(("first", "second"), [(SECRET, None), (None, SECRET), (SECRET, SECRET[:-1])])
def test_all_nodes_have_the_same_secret(first: bytes | None, second: bytes | None) -> None:
    store = FakeStore()
    share_secrets(store, 0, first)
    with pytest.raises(ValueError, match="WAYBILL_RUN_SECRET: must be the same on all nodes"):
        share_secrets(store, 1, second)


def test_a_short_secret_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAYBILL_RUN_SECRET", "")
    assert run_secret() is None
    monkeypatch.setenv("WAYBILL_RUN_SECRET", "short")
    with pytest.raises(ValueError, match="WAYBILL_RUN_SECRET: must have at least 16 bytes"):
        run_secret()


def test_a_node_is_reached_at_the_address_with_which_it_reaches_the_others() -> None:
    assert node_address_towards("127.0.0.1", 1) == "127.0.0.1"
    with pytest.raises(ValueError, match=r"--rdzv-endpoint no\.such\.host\.invalid:1: this node has no way to it"):
        node_address_towards("no.such.host.invalid", 1)
    with pytest.raises(ValueError, match=r"cannot listen on 192\.0\.2\.1"):
        open_listener("192.0.2.1")


def test_collectives_use_the_interface_of_the_nodes_address() -> None:
    assert interface_of("127.0.0.2") == "lo" and interface_of("::1") == "lo"
    assert interface_of("192.0.2.1") is None


MEMBER = """
import sys, time
from waybill.launch.exchange import open_listener
from waybill.launch.node_lifeline import NodeLifeline
role, token, port = sys.argv[1], sys.argv[2].encode(), int(sys.argv[3])
lifeline = NodeLifeline(token, lambda: print("died", flush=True), float(sys.argv[4]))
if role == "serve":
    listener = open_listener("127.0.0.1")
    print(listener.getsockname()[1], flush=True)
    lifeline.serve(listener)
else:
    lifeline.join("127.0.0.1", port)
    print("joined", flush=True)
if sys.stdin.readline() == "farewell\\n":
    lifeline.farewell()
    sys.exit(0)
"""


class Members:
    """Rank 0 and others, each a process with a lifeline."""

    def __init__(self, folder: Path, timeout_s: float = 60.0) -> None:
        self._timeout_s = timeout_s
        self._script = folder / "member.py"
        self._script.write_text(MEMBER)
        self.first = self.start("serve", "0")
        self.port = self.line(self.first)

    def start(self, role: str, port: str, token: str = "t" * 32) -> subprocess.Popen[str]:
        command = [sys.executable, str(self._script), role, token, port, str(self._timeout_s)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def join(self) -> subprocess.Popen[str]:
        member = self.start("join", self.port)
        assert self.line(member) == "joined"
        return member

    @staticmethod
    def line(member: subprocess.Popen[str]) -> str:
        assert member.stdout is not None
        return member.stdout.readline().strip()

    @staticmethod
    def say_farewell(member: subprocess.Popen[str]) -> None:
        assert member.stdin is not None
        member.stdin.write("farewell\n")
        member.stdin.flush()
        assert member.wait(5) == 0


def test_the_death_of_any_rank_ends_all_others(tmp_path: Path) -> None:
    members = Members(tmp_path)
    second, third = members.join(), members.join()
    second.kill()
    for survivor in (members.first, third):
        assert survivor.wait(5) == ORPHANED
        assert members.line(survivor) == "died"


def test_who_says_farewell_may_leave_in_any_order(tmp_path: Path) -> None:
    members = Members(tmp_path)
    second, third = members.join(), members.join()
    for leaving in (second, members.first, third):
        members.say_farewell(leaving)


@pytest.mark.parametrize("victim", ["first", "second"])
def test_a_node_on_which_everything_is_stopped_is_noticed(tmp_path: Path, victim: str) -> None:
    """Its kernel keeps the connection alive."""
    members = Members(tmp_path, timeout_s=3.0)
    ranks = {"first": members.first, "second": members.join(), "third": members.join()}
    stopped = ranks.pop(victim)
    stopped.send_signal(signal.SIGSTOP)
    try:
        for rank in ranks.values():
            assert rank.wait(60) == ORPHANED
            assert members.line(rank) == "died"
    finally:
        stopped.kill()


def test_a_stop_within_the_bound_ends_nothing(tmp_path: Path) -> None:
    members = Members(tmp_path)
    second = members.join()
    second.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    second.send_signal(signal.SIGCONT)
    with pytest.raises(subprocess.TimeoutExpired):
        members.first.wait(1.5)
    members.say_farewell(second)
    members.say_farewell(members.first)


def test_strangers_who_stay_are_few_and_leave_no_room_taken(tmp_path: Path) -> None:
    """Each costs a file: the oldest goes when too many say nothing."""
    members = Members(tmp_path)
    second = members.join()
    clients = [socket.create_connection(("127.0.0.1", int(members.port))) for _ in range(MAX_UNAUTHENTICATED + 8)]
    for client in clients[:8]:
        client.settimeout(20)
        assert client.recv(1) == b"", "closed"
    third = members.join()
    for client in clients:
        client.close()
    for leaving in (third, second, members.first):
        members.say_farewell(leaving)


def test_a_stranger_who_was_dropped_before_it_is_heard_ends_nothing() -> None:
    """The selector may name it in the same look in which a later one takes its place."""
    lifeline = NodeLifeline(b"t" * 32, lambda: None, 5.0)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b"x")
        lifeline._hear_unauthenticated(ours)
        assert ours.recv(1) == b"x", "nothing was taken from it"


def test_strangers_come_and_go(tmp_path: Path) -> None:
    members = Members(tmp_path)
    second = members.join()
    for said in (b"", b"t" * 31, b"x" * 32, b"GET / HTTP/1.1\r\n\r\n" * 10):
        with socket.create_connection(("127.0.0.1", int(members.port))) as client:
            client.sendall(said)
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(0.3)
    assert members.first.poll() is None
    members.say_farewell(second)
    members.say_farewell(members.first)
