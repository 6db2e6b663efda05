"""The sockets between engines: questions that wait, answers in parts, and who is gone."""

from __future__ import annotations

import queue
import time
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from support.engine_pair import HOST, free_port

from waybill.engine.disaggregation import transfer_client
from waybill.engine.disaggregation.page_client import FetchedPrompts, RankShape
from waybill.engine.disaggregation.page_copy import HostPages
from waybill.engine.disaggregation.page_server import SharedPrompts
from waybill.engine.disaggregation.transfer_client import TransferClient
from waybill.engine.disaggregation.transfer_server import TransferServer
from waybill.engine.disaggregation.wire import Release, Welcome, difference
from waybill.engine.io_struct import FirstToken, TransferSource
from waybill.engine.ipc.frontend_messages import TransferNotice
from waybill.engine.ipc.sockets import CurveKeys, Endpoint
from waybill.engine.kv_cache.kv_store import KVStore, KVTensorSpec
from waybill.engine.plan import DropPages, FetchPages, SharePages

FACTS = {"dtype": "float32", "kv_heads": "1"}
PAGES = np.arange(8, dtype=np.int32)


def pool() -> KVStore:
    return KVStore(1, 8, 1, [KVTensorSpec("k", (1, 2), torch.float32)], torch.device("cpu"))


@dataclass
class Sides:
    """A rank of each side, with real sockets; `notices` is what the decode's leader is told."""

    keys: CurveKeys = field(default_factory=CurveKeys.make)
    port: int = field(default_factory=free_port)
    timeout_s: float = 30.0
    there: KVStore = field(default_factory=pool)
    here: KVStore = field(default_factory=pool)
    notices: queue.SimpleQueue[TransferNotice] = field(default_factory=queue.SimpleQueue)
    releases: queue.SimpleQueue[Release] = field(default_factory=queue.SimpleQueue)

    def serve(self) -> SharedPrompts:
        prompts = SharedPrompts(HostPages(self.there, 1), self.releases.put)
        address = f"tcp://{HOST}:{self.port}"
        server = TransferServer(
            Endpoint(address, self.keys),
            "one",
            prompts,
            self.timeout_s,
            welcome=Welcome("one", [[address]], ""),
            facts=FACTS,
        )
        prompts.wake = server.wake
        server.start()
        return prompts

    def fetch(self, facts: dict[str, str] = FACTS, keys: CurveKeys | None = None) -> FetchedPrompts:
        client = TransferClient(keys or self.keys, facts, lambda welcome, source: welcome.pages[0][0])
        client.start()
        return FetchedPrompts(client, RankShape(0, 1, 1), HostPages(self.here, 1), self.notices.put)

    def ask(self, room: int = 1, end: int = 6) -> FetchPages:
        return FetchPages(TransferSource(HOST, self.port, room), 1, 2, end, PAGES.tobytes())

    def notice(self) -> TransferNotice:
        return self.notices.get(timeout=20)


@pytest.fixture
def sides() -> Sides:
    return Sides()


def test_parts_come_as_they_are_ready_and_nothing_else_is_written(sides: Sides) -> None:
    next(sides.there.tensors())[:] = torch.arange(9.0).view(9, 1, 1)
    shared, fetched = sides.serve(), sides.fetch()
    # Asked for before the prefill knows of it; page 7 - i is position i there.
    fetched.handle(sides.ask())
    shared.handle(SharePages("1.0", PAGES[::-1].tobytes(), 4))
    time.sleep(0.05)
    assert sides.notices.empty()
    shared.handle(SharePages("1.0", b"", 6, FirstToken([5], "w")))
    assert sides.notice() == TransferNotice("1.0", "pages0", 1, "", FirstToken([5], "w"))
    assert next(sides.here.tensors())[:, 0, 0].tolist() == [0, 0, 5, 4, 3, 2, 0, 0, 0]
    fetched.handle(DropPages("1.0"))
    assert sides.releases.get(timeout=5) == Release("1.0")
    assert fetched.counters()["transferred_bytes"] == shared.counters()["transferred_bytes"] == 4 * 8


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
    assert "nothing was heard of it" in sides.notice().error
