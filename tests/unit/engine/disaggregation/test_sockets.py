"""The sockets between engines: questions that wait, answers in parts, and who is gone."""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
import torch
from support.engine_pair import HOST, free_port

from waybill.engine.disaggregation import mapped_pool, transfer_client
from waybill.engine.disaggregation.mapped_pool import MappedPool, SharedExport
from waybill.engine.disaggregation.page_client import FetchedPrompts, RankShape
from waybill.engine.disaggregation.page_copy import HostPages
from waybill.engine.disaggregation.page_server import SharedPrompts
from waybill.engine.disaggregation.pool_export import PoolExport
from waybill.engine.disaggregation.remote_pool import NotMappableError, RemotePool
from waybill.engine.disaggregation.remote_pools import RemotePools
from waybill.engine.disaggregation.transfer_client import TransferClient
from waybill.engine.disaggregation.transfer_server import TransferServer
from waybill.engine.disaggregation.wire import (
    DeviceMemory,
    HostMemory,
    HostProof,
    NixlMemory,
    PoolPlace,
    Release,
    Welcome,
    difference,
)
from waybill.engine.io_struct import FirstToken, TransferSource
from waybill.engine.ipc.frontend_messages import TransferNotice
from waybill.engine.ipc.sockets import CurveKeys, Endpoint
from waybill.engine.kv_cache.kv_store import KVStore, KVTensorSpec
from waybill.engine.plan import DropPages, FetchPages, SharePages

FACTS = {"dtype": "float32", "kv_heads": "1"}
PAGES = np.arange(8, dtype=np.int32)


def pool(*, is_shared: bool = False) -> KVStore:
    return KVStore(1, 8, 1, [KVTensorSpec("k", (1, 2), torch.float32)], torch.device("cpu"), is_shared=is_shared)


@dataclass
class Sides:
    """A rank of each side, with real sockets; `notices` is what the decode's leader is told."""

    keys: CurveKeys = field(default_factory=CurveKeys.make)
    port: int = field(default_factory=free_port)
    timeout_s: float = 30.0
    there: KVStore = field(default_factory=lambda: pool(is_shared=True))
    here: KVStore = field(default_factory=pool)
    notices: queue.SimpleQueue[TransferNotice] = field(default_factory=queue.SimpleQueue)
    releases: queue.SimpleQueue[Release] = field(default_factory=queue.SimpleQueue)
    server: TransferServer | None = None

    def serve(self, transport: str = "auto") -> SharedPrompts:
        export = None if transport == "tcp" else PoolExport(self.there, 1, SharedExport(self.there))
        prompts = SharedPrompts(HostPages(self.there, 1), self.releases.put, export, transport)
        address = f"tcp://{HOST}:{self.port}"
        server = TransferServer(
            Endpoint(address, self.keys),
            "one",
            prompts,
            self.timeout_s,
            welcome=Welcome("one", [[address]], ""),
            facts=FACTS,
            pool_generation=prompts.pool_generation,
        )
        prompts.wake = server.wake
        if export is not None:
            export.has_holders = server.has_holders
        self.server = server
        server.start()
        return prompts

    def fetch(
        self,
        facts: dict[str, str] = FACTS,
        keys: CurveKeys | None = None,
        transport: str = "auto",
        copy: HostPages | None = None,
    ) -> FetchedPrompts:
        self.pools = RemotePools(self.open_pool, transport)
        client = TransferClient(keys or self.keys, facts, lambda welcome, source: welcome.pages[0][0], self.pools)
        client.start()
        copy = copy or HostPages(self.here, 1)
        return FetchedPrompts(client, RankShape(0, 1, 1), copy, self.pools, self.notices.put)

    def open_pool(self, place: PoolPlace) -> RemotePool:
        return MappedPool(place, self.here, 1)

    def ask(self, room: int = 1, end: int = 6) -> FetchPages:
        return FetchPages(TransferSource(HOST, self.port, room), 1, 2, end, PAGES.tobytes())

    def notice(self) -> TransferNotice:
        return self.notices.get(timeout=20)


@pytest.fixture
def sides() -> Sides:
    return Sides()


@pytest.mark.parametrize(
    ("there", "here"),
    [("auto", "auto"), ("tcp", "auto"), ("auto", "tcp"), ("shared", "auto"), ("auto", "shared")],
)
def test_parts_come_as_they_are_ready_and_nothing_else_is_written(sides: Sides, there: str, here: str) -> None:
    next(sides.there.tensors())[:] = torch.arange(9.0).view(9, 1, 1)
    shared, fetched = sides.serve(there), sides.fetch(transport=here)
    # Asked for before the prefill knows of it; page 7 - i is position i there.
    fetched.handle(sides.ask())
    shared.handle(SharePages("1.0", PAGES[::-1].tobytes(), 4))
    time.sleep(0.05)
    assert sides.notices.empty()
    shared.handle(SharePages("1.0", b"", 6, FirstToken([5], "w")))
    assert sides.notice() == TransferNotice("1.0", "pages0", 1, "", FirstToken([5], "w"))
    assert next(sides.here.tensors())[:, 0, 0].tolist() == [0, 0, 5, 4, 3, 2, 0, 0, 0]
    fetched.handle(DropPages("1.0"))
    assert sides.releases.get(timeout=5) == Release("1.0", incarnation="one")
    mapped_bytes = 0 if "tcp" in (there, here) else 4 * 8
    for side in (fetched, shared):
        assert side.counters()["transferred_bytes"] == 4 * 8
        assert side.counters()["transferred_shared_bytes"] == mapped_bytes


def test_a_request_that_ends_there_fails_here_and_one_dropped_here_is_not_heard_of(sides: Sides) -> None:
    shared, fetched = sides.serve(), sides.fetch()
    fetched.handle(sides.ask(1))
    fetched.handle(sides.ask(2))
    fetched.handle(DropPages("2.0", "aborted"))
    shared.handle(SharePages("1.0", PAGES.tobytes(), 3))
    shared.handle(SharePages("2.0", PAGES.tobytes(), 6, FirstToken([5], "w")))
    shared.handle(DropPages("1.0", "not finite"))
    notice = sides.notice()
    assert (notice.key, notice.error, notice.first) == ("1.0", "not finite", None)
    # Later questions hear the same.
    fetched.handle(sides.ask(1))
    assert sides.notice().error == "not finite"
    fetched.handle(sides.ask(3, end=9))
    shared.handle(SharePages("3.0", PAGES.tobytes(), 6, FirstToken([5], "w")))
    assert "the prompt has 6 positions" in sides.notice().error
    assert sides.notices.empty()


def test_engines_that_do_not_go_together_and_prompts_that_never_come(sides: Sides) -> None:
    sides.timeout_s = 0.2
    sides.serve()
    sides.fetch({**FACTS, "dtype": "bfloat16"}).handle(sides.ask())
    assert "dtype: float32 on the prefill's side, bfloat16 on the decode's" in sides.notice().error
    sides.fetch().handle(sides.ask())
    assert "has not come to it within 0.2 s" in sides.notice().error
    assert difference(FACTS, FACTS) == ""


def test_nobody_there_and_other_keys(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer_client, "SILENCE_S", 1.0)
    sides.fetch().handle(sides.ask())
    assert "nothing was heard of it" in sides.notice().error
    sides.serve()
    sides.fetch(keys=CurveKeys.make()).handle(sides.ask())
    assert "has it another WAYBILL_RUN_SECRET?" in sides.notice().error


def test_one_side_wants_what_the_other_does_not_give(sides: Sides) -> None:
    shared = sides.serve("tcp")
    shared.handle(SharePages("1.0", PAGES.tobytes(), 6))
    sides.fetch(transport="shared").handle(sides.ask())
    assert "--disaggregation-transport shared: the prefill's side sends bytes" in sides.notice().error
    other = Sides()
    other.serve("shared").handle(SharePages("1.0", PAGES.tobytes(), 6))
    other.fetch(transport="tcp").handle(other.ask())
    assert "the prefill's side has --disaggregation-transport shared" in other.notice().error


def mapped_sides(sides: Sides, positions: int) -> tuple[SharedPrompts, FetchedPrompts]:
    """A prompt of six positions of which some have been copied."""
    shared, fetched = sides.serve(), sides.fetch()
    shared.handle(SharePages("1.0", PAGES.tobytes(), positions))
    fetched.handle(sides.ask())
    until(lambda: fetched.counters()["transferred_shared_bytes"] == (positions - 2) * 8)
    return shared, fetched


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_what_was_copied_under_a_lease_that_has_ended_counts_for_nothing(sides: Sides) -> None:
    """Also where another prompt has the same key since, and all of its positions."""
    shared, _ = mapped_sides(sides, 6)
    with shared._lock:
        # Not yet answered: the pages go to somebody else meanwhile.
        del shared._prompts["1.0"]
    shared.handle(SharePages("1.0", PAGES[::-1].tobytes(), 6, FirstToken([5], "w")))
    assert "has let go of it" in sides.notice().error


def test_memory_that_is_given_back_is_there_again_and_a_pool_that_has_moved_is_mapped_anew(sides: Sides) -> None:
    shared, fetched = mapped_sides(sides, 6)
    shared.handle(SharePages("1.0", b"", 6, FirstToken([5], "w")))
    assert sides.notice().error == ""
    next(sides.there.tensors())[:] = 7.0
    sides.there.release()
    # Whoever maps it sees nothing of what was there.
    until(lambda: not sides.pools.is_needed)
    assert not next(sides.there.tensors()).any()
    sides.there.resume()
    # As on a device, where memory that is taken again lies elsewhere.
    sides.there.generation += 1
    next(sides.there.tensors())[:] = torch.arange(9.0).view(9, 1, 1)
    shared.handle(SharePages("2.0", PAGES.tobytes(), 6, FirstToken([5], "w")))
    fetched.handle(sides.ask(2))
    assert sides.notice().error == ""
    assert next(sides.here.tensors())[:6, 0, 0].tolist() == [0, 0, 2, 3, 4, 5]
    assert fetched.counters()["transferred_bytes"] == fetched.counters()["transferred_shared_bytes"]


def test_memory_of_a_device_is_given_back_when_nobody_has_it_mapped_any_more(sides: Sides) -> None:
    shared, _ = mapped_sides(sides, 6)
    shared.handle(SharePages("1.0", b"", 6, FirstToken([5], "w")))
    assert sides.notice().error == ""
    assert sides.server is not None
    until(sides.server.has_holders)
    # As a device's pool is released.
    sides.there.generation = 0
    began = time.monotonic()
    sides.there.before_release()
    assert not sides.pools.is_needed and not sides.server.has_holders()
    assert time.monotonic() - began < mapped_pool.UNMAP_WAIT_S


def test_who_is_stopped_with_the_memory_mapped_is_not_waited_for_without_end(
    sides: Sides, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mapped_pool, "UNMAP_WAIT_S", 0.05)
    export = PoolExport(sides.there, 1, SharedExport(sides.there))
    export.has_holders = lambda: True
    sides.there.before_release()
    assert "still has the KV cache mapped" in caplog.text


def test_nothing_is_written_to_pages_that_a_step_in_flight_may_still_write_to(sides: Sides) -> None:
    """The request that had them ended after the step was launched."""
    is_done = threading.Event()

    class Pages(HostPages):
        def mark(self) -> Callable[[], None]:
            return lambda: assert_true(is_done.wait(20))

    next(sides.there.tensors())[:] = torch.arange(1.0, 10.0).view(9, 1, 1)
    shared = sides.serve()
    for room, transport in enumerate(("auto", "tcp"), start=1):
        is_done.clear()
        next(sides.here.tensors())[:] = 0
        fetched = sides.fetch(transport=transport, copy=Pages(sides.here, 1))
        shared.handle(SharePages(f"{room}.0", PAGES.tobytes(), 6, FirstToken([5], "w")))
        fetched.handle(sides.ask(room))
        time.sleep(0.2)
        assert not next(sides.here.tensors()).any() and sides.notices.empty()
        is_done.set()
        assert sides.notice().error == ""
        assert next(sides.here.tensors())[:6, 0, 0].tolist() == [0, 0, 3, 4, 5, 6]


def assert_true(value: bool) -> None:
    assert value


def test_who_drops_a_request_does_not_wait_until_a_pool_is_mapped(
    sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver may take long to open a handle; the step thread drops."""
    begun, may_end = threading.Event(), threading.Event()

    def open_slowly(place: PoolPlace) -> RemotePool:
        begun.set()
        assert may_end.wait(20)
        return MappedPool(place, sides.here, 1)

    monkeypatch.setattr(sides, "open_pool", open_slowly)
    shared, fetched = sides.serve(), sides.fetch()
    shared.handle(SharePages("1.0", PAGES.tobytes(), 6, FirstToken([5], "w")))
    fetched.handle(sides.ask())
    assert begun.wait(20)
    dropping = threading.Thread(target=fetched.handle, args=[DropPages("1.0", "aborted")])
    dropping.start()
    dropping.join(5)
    was_waiting = dropping.is_alive()
    may_end.set()
    assert not was_waiting
    # The next request finds the pool mapped.
    shared.handle(SharePages("2.0", PAGES.tobytes(), 6, FirstToken([5], "w")))
    fetched.handle(sides.ask(2))
    assert sides.notice() == TransferNotice("2.0", "pages0", 1, "", FirstToken([5], "w"))
    assert sides.notices.empty()


def test_a_connection_that_ends_fails_who_waits_and_lets_go_of_the_pool(sides: Sides) -> None:
    """The other side is not asked whether it is dead: the next job says hello anew."""
    shared, fetched = mapped_sides(sides, 3)
    for connection in psutil.Process().net_connections("tcp"):
        if connection.raddr and connection.raddr.port == sides.port:
            with socket.socket(fileno=os.dup(connection.fd)) as own:
                own.shutdown(socket.SHUT_RDWR)
    notice = sides.notice()
    assert "the connection has ended" in notice.error
    until(lambda: not sides.pools.is_needed)
    fetched.handle(DropPages("1.0", "the connection has ended"))
    assert sides.releases.get(timeout=5) == Release("1.0", "the connection has ended", "one")
    shared.handle(SharePages("1.0", b"", 6, FirstToken([5], "w")))
    fetched.handle(sides.ask())
    assert sides.notice().error == "" and sides.pools.is_needed


BAD_PLACES: list[tuple[Callable[[PoolPlace, HostMemory], PoolPlace], str]] = [
    (lambda place, memory: with_proof(place, memory, path="/etc/hostname"), "no descriptor of a process"),
    (lambda place, memory: with_proof(place, memory, path="/proc/1/fd/99999"), "not on this host"),
    (lambda place, memory: with_proof(place, memory, content=bytes(32)), "not on this host"),
    (lambda place, _: msgspec.structs.replace(place, stacks=[(0, [2, 9, 1, 2])]), "its tensors are others"),
    (lambda place, _: msgspec.structs.replace(place, stacks=[(0, [1, 900, 1, 2])]), "its tensors are not in it"),
    (lambda place, _: msgspec.structs.replace(place, num_bytes=1 << 30), "mmap length is greater"),
    (
        lambda place, memory: msgspec.structs.replace(place, memory=DeviceMemory(memory.proof, bytes(64), 0)),
        "one pool is on the host",
    ),
    (
        lambda place, _: msgspec.structs.replace(place, memory=NixlMemory("other", b"", 0, None)),
        "the prefill's side has --disaggregation-transport nixl",
    ),
]


def with_proof(place: PoolPlace, memory: HostMemory, **changes: Any) -> PoolPlace:
    proof: HostProof = msgspec.structs.replace(memory.proof, **changes)
    return msgspec.structs.replace(place, memory=HostMemory(proof, memory.path))


@pytest.mark.parametrize(("change", "why"), BAD_PLACES)
def test_a_pool_is_mapped_only_on_proof_of_the_same_host(
    sides: Sides, change: Callable[[PoolPlace, HostMemory], PoolPlace], why: str
) -> None:
    place = PoolExport(sides.there, 1, SharedExport(sides.there)).place("1.0", 1)
    assert isinstance(place.memory, HostMemory)
    bad = change(place, place.memory)
    with pytest.raises(NotMappableError, match=why):
        MappedPool(bad, sides.here, 1)
    pools = RemotePools(sides.open_pool, "auto")
    pools.open("there", bad)
    assert pools.transport("there") == "tcp", "bytes are asked for"
    pools.lost("there")
    pools.open("there", place)
    assert (pools.transport("there"), pools.held("there")) == ("shared", 1)
    with pytest.raises(ValueError, match="pages that the pool does not have"):
        pools.get("there").copy(np.array([9], np.int32), PAGES, 0, 1, None, None)
    with pytest.raises(ValueError, match="1 pages for positions 0"):
        pools.get("there").copy(np.array([1], np.int32), PAGES, 0, 2, None, None)
