"""Pools that are read by agents: of one process here, whose reads hang and fail as they are told."""

from __future__ import annotations

import builtins
import ctypes
import time
from functools import partial
from importlib.util import find_spec
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from waybill.engine.config import EngineConfig
from waybill.engine.disaggregation import nixl_pool
from waybill.engine.disaggregation.head_plan import head_slices
from waybill.engine.disaggregation.nixl_agent import NixlAgent, NixlError, Read, Registration, import_nixl
from waybill.engine.disaggregation.nixl_pool import NixlExport, NixlReader
from waybill.engine.disaggregation.page_copy import HostPages
from waybill.engine.disaggregation.pool_export import PoolExport
from waybill.engine.disaggregation.remote_pool import NotMappableError
from waybill.engine.disaggregation.remote_pools import RemotePools
from waybill.engine.disaggregation.wire import NixlMemory, PoolPlace
from waybill.engine.kv_cache.kv_store import KVStore, KVTensorSpec
from waybill.launch import node_options
from waybill.launch.node_options import RUN_SECRET_VARIABLE, check_partners

CPU = torch.device("cpu")
PAGES = np.array([3, 1, 2], dtype=np.int32)


class FakeRead:
    def __init__(self, network: Network, pieces: list[tuple[int, int, int]]) -> None:
        self._network = network
        self._pieces = pieces
        self.is_closed = False

    def is_done(self) -> bool:
        assert not self.is_closed
        if self._network.fails:
            raise NixlError("remote disconnect")
        if not self._network.hangs:
            for ours, theirs, size in self._pieces:
                ctypes.memmove(ours, theirs, size)
            self._pieces = []
        return not self._pieces

    def close(self) -> None:
        assert not self.is_closed and (self._network.fails or not self._pieces)
        self.is_closed = True


class Network:
    """What agents are on."""

    def __init__(self) -> None:
        self.agents: dict[str, FakeAgent] = {}
        self.hangs = self.fails = False

    def agent(self) -> FakeAgent:
        agent = FakeAgent(self, f"agent {len(self.agents)}")
        self.agents[agent.name] = agent
        return agent


class FakeRegistration:
    def __init__(self, agent: FakeAgent, memory: torch.Tensor) -> None:
        self._agent = agent
        self.first, self.end = memory.data_ptr(), memory.data_ptr() + memory.nbytes

    def close(self) -> None:
        self._agent.registered.remove(self)


class FakeAgent:
    def __init__(self, network: Network, name: str) -> None:
        self.name = name
        self._network = network
        self.registered: list[FakeRegistration] = []
        self.known: set[str] = set()
        self.is_closed = False

    def register(self, memory: torch.Tensor) -> Registration:
        self.registered.append(FakeRegistration(self, memory))
        return self.registered[-1]

    def metadata(self) -> bytes:
        return self.name.encode()

    def add(self, metadata: bytes) -> str:
        if metadata.decode() not in self._network.agents:
            raise NixlError("no such agent")
        self.known.add(metadata.decode())
        return metadata.decode()

    def remove(self, remote: str) -> None:
        self.known.remove(remote)

    def has(self, address: int, size: int) -> bool:
        return any(one.first <= address and address + size <= one.end for one in self.registered)

    def read(self, remote: str, memory: torch.Tensor, ours: np.ndarray, theirs: np.ndarray, device: int | None) -> Read:
        assert remote in self.known and device is None
        other = self._network.agents[remote]
        if other.is_closed:
            raise NixlError("remote disconnect")
        pieces = [(int(a), int(b), int(size)) for (a, size), (b, _) in zip(ours, theirs, strict=True)]
        assert all(self.has(a, size) and other.has(b, size) for a, b, size in pieces)
        return FakeRead(self._network, pieces)

    def close(self) -> None:
        self.is_closed = True


def store(num_heads: int, page_size: int = 2) -> KVStore:
    specs = [KVTensorSpec("k", (num_heads, 3), torch.bfloat16), KVTensorSpec("latent", (5,), torch.float32)]
    made = KVStore(2, 16 // page_size, page_size, specs, CPU)
    for index, tensor in enumerate(made.tensors()):
        tensor += torch.arange(tensor.numel()).view(tensor.shape) % 97 + index
    return made


class Pair:
    """A rank of each side."""

    def __init__(self, num_heads: int = 2, transport: str = "nixl") -> None:
        self.network = Network()
        self.there, self.here = store(num_heads), store(num_heads, 4)
        self.export = PoolExport(self.there, 2, NixlExport(self.there, self.network.agent))
        self.agent = self.network.agent()
        self.reader = NixlReader(self.here, 4, self.agent)
        self.pools = RemotePools(self.reader.open, transport)

    def place(self) -> PoolPlace:
        return self.export.place("1.0", 1)

    def fetch(self, start: int, end: int) -> None:
        self.pools.read("there", PAGES[start // 2 :], start, end, None)
        self.pools.get("there").copy(PAGES[start // 2 :], PAGES, start, end, None, None)

    def same(self, end: int) -> bool:
        there, here = HostPages(self.there, 2), HostPages(self.here, 4)
        return there.gather(PAGES, 0, end, None) == here.gather(PAGES, 0, end, None)


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Pair:
    monkeypatch.setattr(nixl_pool, "READ_TIMEOUT_S", 0.05)
    return Pair()


def test_positions_of_two_ranks_are_read_into_one() -> None:
    network, here = Network(), store(4, 4)
    there = [store(2), store(2)]
    there[1].memory[:] = there[1].memory.flip(0)
    reader = NixlReader(here, 4, network.agent())
    for one in head_slices(4, 2, 1, 0):
        rank = there[one.rank]
        place = PoolExport(rank, 2, NixlExport(rank, network.agent)).place("1.0", 1)
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(place), type=PoolPlace) == place
        pool = reader.open(place)
        for start, end in ((0, 3), (3, 6)):
            pool.read(PAGES[start // 2 :], start, end, one.theirs)
            num_bytes = pool.copy(PAGES[start // 2 :], PAGES, start, end, one.theirs, one.ours)
            assert num_bytes == (end - start) * HostPages(rank, 2).bytes_per_position(one.theirs)
        found = HostPages(here, 4).gather(PAGES, 0, 6, one.ours)
        assert found == HostPages(rank, 2).gather(PAGES, 0, 6, one.theirs)
        pool.close()
    assert reader.agent.known == set() and reader.agent.registered == []  # type: ignore[attr-defined]


def test_a_read_that_hangs_writes_nothing_later_and_its_memory_is_kept_until_it_ends(pair: Pair) -> None:
    place = pair.place()
    pair.pools.open("there", place)
    pair.network.hangs = True
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"--disaggregation-transport nixl: a read has not ended within 0\.05 s"):
        pair.fetch(0, 6)
    assert time.monotonic() - began < 5
    assert pair.pools.held("there") == 0 and len(pair.agent.registered) == 1
    with pytest.raises(ValueError, match="a read that was begun earlier has not ended"):
        pair.pools.open("there", place)
    before = pair.here.memory.clone()
    pair.network.hangs = False
    pair.pools.open("there", place)
    assert len(pair.agent.registered) == 1, "that of the new one"
    assert torch.equal(pair.here.memory, before)
    pair.fetch(0, 6)
    assert pair.same(6)


def test_a_read_that_fails_lets_go_of_the_pool(pair: Pair) -> None:
    pair.pools.open("there", pair.place())
    pair.network.fails = True
    with pytest.raises(ValueError, match="remote disconnect"):
        pair.fetch(0, 6)
    assert not pair.pools.is_needed and pair.agent.registered == [] and pair.agent.known == set()
    pair.network.fails = False
    pair.pools.open("there", pair.place())
    pair.fetch(0, 6)
    assert pair.same(6)


def test_memory_that_is_given_back_is_read_by_nobody_and_is_another_agents_later(pair: Pair) -> None:
    place = pair.place()
    pair.pools.open("there", place)
    pair.there.release()
    assert pair.network.agents["agent 0"].is_closed
    with pytest.raises(ValueError, match="remote disconnect"):
        pair.fetch(0, 2)
    with pytest.raises(NixlError, match="has been given back"):
        pair.export.place("1.0", 1)
    pair.there.resume()
    pair.there.memory.fill_(7)
    again = pair.place()
    assert again.generation > place.generation and again.memory != place.memory
    pair.pools.open("there", again)
    pair.pools.seen("there", again.generation)
    pair.fetch(0, 4)
    assert pair.same(4)
    pair.pools.seen("there", 0)
    assert not pair.pools.is_needed and pair.agent.known == set()


@pytest.mark.skipif(find_spec("nixl") is None, reason="NIXL is not installed: the extra `nixl`")
def test_agents_of_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one process, over sockets: what is read, refused and lost."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    there, here = store(2), store(2, 4)
    export = PoolExport(there, 2, NixlExport(there, partial(NixlAgent, CPU)))
    pools = RemotePools(NixlReader(here, 4, NixlAgent(CPU)).open, "nixl")

    def fetch(end: int) -> None:
        pools.read("there", PAGES, 0, end, (0, 1))
        pools.get("there").copy(PAGES, PAGES, 0, end, (0, 1), (0, 1))
        wanted = HostPages(there, 2).gather(PAGES, 0, end, (0, 1))
        assert HostPages(here, 4).gather(PAGES, 0, end, (0, 1)) == wanted

    place = export.place("1.0", 1)
    assert isinstance(place.memory, NixlMemory)
    for metadata in (b"", b"no metadata"):
        broken = msgspec.structs.replace(place, memory=msgspec.structs.replace(place.memory, metadata=metadata))
        with pytest.raises(ValueError, match="--disaggregation-transport nixl: NIXL"):
            pools.open("there", broken)
    elsewhere = msgspec.structs.replace(place.memory, address=place.memory.address - (1 << 20))
    pools.open("there", msgspec.structs.replace(place, memory=elsewhere))
    with pytest.raises(ValueError, match="NIXL_ERR_NOT_FOUND"):
        fetch(2)
    pools.open("there", place)
    fetch(5)
    there.release()
    with pytest.raises(ValueError, match="NIXL_ERR_REMOTE_DISCONNECT"):
        fetch(2)
    there.resume()
    there.memory.fill_(7)
    pools.open("there", export.place("1.0", 1))
    fetch(6)
    pools.lost("there")
    assert not pools.is_needed


def test_places_that_are_none(pair: Pair) -> None:
    place = pair.place()
    other = msgspec.structs.replace(place.memory, agent="another")
    for change, why in (
        ({"stacks": place.stacks[:1]}, "its tensors are others"),
        ({"num_bytes": 10}, "its tensors are not in it"),
        ({"memory": other}, "the agent is 'agent 0', not 'another'"),
        ({"memory": msgspec.structs.replace(place.memory, metadata=b"nobody")}, "no such agent"),
    ):
        with pytest.raises(NotMappableError, match=why):
            pair.reader.open(msgspec.structs.replace(place, **change))
    assert pair.agent.registered == [] and pair.agent.known == set()
    pair.pools.open("there", place)
    with pytest.raises(ValueError, match="pages that the pool does not have"):
        pair.pools.read("there", np.array([9], np.int32), 0, 2, None)
    monstrous = np.zeros(1 << 20, dtype=np.int32)
    with pytest.raises(ValueError, match="more than this side has room for"):
        pair.pools.read("there", monstrous, 0, 1 << 17, None)


def test_without_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The option and the extra are named, before a rank starts and where one would import it."""
    real = builtins.__import__

    def refuse(name: str, *args: Any, **more: Any) -> Any:
        if name == "nixl":
            raise ImportError("no module of that name")
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(NixlError, match=r"--disaggregation-transport nixl needs NIXL \(no module.*waybill\[nixl\]"):
        import_nixl()
    monkeypatch.setenv(RUN_SECRET_VARIABLE, "a secret of both engines")
    monkeypatch.setattr(node_options, "find_spec", lambda name: None)
    for transport, refused in (("nixl", True), ("auto", False)):
        config = EngineConfig(model_path="m", disaggregation="decode", disaggregation_transport=transport)
        if refused:
            with pytest.raises(ValueError, match=r"--disaggregation-transport nixl: needs NIXL.*waybill\[nixl\]"):
                check_partners(config, num_nodes=1)
        else:
            check_partners(config, num_nodes=1)
