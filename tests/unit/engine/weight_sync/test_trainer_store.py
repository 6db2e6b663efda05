"""What a client may name as a trainer, and what becomes of an engine that believes it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import torch

from waybill.engine.config import EngineConfig
from waybill.engine.control.operations import InitWeightsUpdateGroup
from waybill.engine.validation.host_names import check_address
from waybill.engine.weight_sync.group_registry import GroupRegistry
from waybill.parallel.mesh import ParallelMesh

HERE = "127.0.0.1"
BANNER = b"220 a-secret-banner smtp ready\r\n"


@pytest.mark.parametrize(
    "host", ["localhost", "trainer-0.rl_jobs.svc.cluster.local", "10.0.0.1", "fe80::1", "a.", "x" * 63]
)
def test_hosts(host: str) -> None:
    check_address(host, None)


@pytest.mark.parametrize(
    "host",
    [
        "",
        ".",
        "a..b",
        "-a",
        "a-",
        "a b",
        "a/b",
        "10.0.0.0/8",
        "http://a",
        "a:1",
        "[::1]",
        "x" * 64,
        "a." * 127,
        "ä",
        "a\n",
        "a\0",
    ],
)
def test_what_is_no_host(host: str) -> None:
    with pytest.raises(
        ValueError, match=r"master_address=.*must be an IP address or a host name, of at most 253 characters"
    ):
        check_address(host, None)


@pytest.mark.parametrize(
    ("allowed", "host", "is_allowed"),
    [
        (("10.1.0.0/16",), "10.1.2.3", True),
        (("10.1.0.0/16",), "10.2.0.1", False),
        (("10.1.2.3", "trainer"), "10.1.2.3", True),
        (("10.1.2.3", "trainer"), "TRAINER", True),
        (("10.1.2.3", "trainer"), "trainer.evil.example", False),
        # A name is not looked up.
        (("127.0.0.0/8",), "localhost", False),
        (("fd00::/8",), "fd00::1", True),
        (("fd00::/8",), "10.0.0.1", False),
        ((), "localhost", False),
    ],
)
def test_hosts_that_weights_may_come_from(allowed: tuple[str, ...], host: str, is_allowed: bool) -> None:
    if is_allowed:
        check_address(host, allowed)
        return
    with pytest.raises(ValueError, match=f"master_address='{host}': is none of the hosts"):
        check_address(host, allowed)


def test_wrong_hosts_in_the_configuration() -> None:
    with pytest.raises(ValueError, match="weight_sync_hosts: 'a b' must be a host name, an IP address or a network"):
        EngineConfig(model_path="m", weight_sync_hosts=("a", "a b"))
    with pytest.raises(ValueError, match="weight_sync_groups=0: must be at least 1"):
        EngineConfig(model_path="m", weight_sync_groups=0)


@contextmanager
def stranger(says: str) -> Iterator[int]:
    """Something that is no store; its port."""
    connections: list[socket.socket] = []

    def talk(connection: socket.socket) -> None:
        with suppress(OSError):
            if says == "banner":
                connection.sendall(BANNER)
            elif says == "bye":
                connection.close()
            while says in ("drip", "flood"):
                connection.sendall(b"\1" if says == "drip" else b"\0" * 65536)
                time.sleep(0.05 if says == "drip" else 0)

    def serve() -> None:
        with suppress(OSError):
            while True:
                connections.append(listener.accept()[0])
                threading.Thread(target=talk, args=(connections[-1],), daemon=True).start()

    with socket.create_server((HERE, 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    for connection in connections:
        connection.close()


def request(port: int, name: str) -> InitWeightsUpdateGroup:
    return InitWeightsUpdateGroup(HERE, port, 1, 2, name, "gloo")


@pytest.mark.parametrize("says", ["nothing", "banner", "bye", "drip", "flood"])
def test_what_listens_there_is_not_told(says: str) -> None:
    """A join ends in time, whatever it meets, and says the same of everything."""
    registry = GroupRegistry(ParallelMesh.single(torch.device("cpu")), 1.0, 8)
    done, said = threading.Event(), []

    def note(error: str | None) -> None:
        said.append(error)
        done.set()

    with stranger(says) as port:
        registry.join(request(port, "g"), note)
        assert done.wait(30)
    assert said == ["group 'g' did not come together within 1 s; the log of rank 0 says why"]
    registry.check(request(port, "g"))


def test_joins_do_not_pile_up() -> None:
    registry = GroupRegistry(ParallelMesh.single(torch.device("cpu")), 1.0, 2)
    done = [threading.Event(), threading.Event()]
    with stranger("nothing") as port:
        for number, event in enumerate(done):
            registry.check(request(port, f"g{number}"))
            registry.join(request(port, f"g{number}"), lambda _, event=event: event.set())
        with pytest.raises(
            ValueError, match=r"group_name: 2 groups \(weight_sync_groups\) are joined or still to come"
        ):
            registry.check(request(port, "g2"))
        assert all(event.wait(30) for event in done)
    registry.check(request(port, "g2"))
