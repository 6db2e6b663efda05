"""A leader's half of transfers: who waits for what, and how it ends. Pure: no sockets, a clock by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from waybill.engine.disaggregation.transfer_server import MAX_REMEMBERED
from waybill.engine.io_struct import (
    FinishReason,
    FirstToken,
    Logprobs,
    OutputOptions,
    SamplingParams,
    TokenOutput,
    TransferSource,
)
from waybill.engine.ipc.frontend_messages import TokenizedGenerateReqInput, TransferNotice
from waybill.engine.kv_cache.page_pool import Pages
from waybill.engine.plan import DropPages, FetchPages, PageMessage, SharePages
from waybill.engine.scheduler.decode_transfers import DecodeTransfers
from waybill.engine.scheduler.prefill_transfers import MAX_ENDED, PrefillTransfers
from waybill.engine.scheduler.req import Req
from waybill.engine.vision.placed_image import PlacedImage

FIRST = FirstToken([9], "w")
PLAIN = OutputOptions()
SCORED = OutputOptions(return_logprob=True, logprob_start_len=0)
PROMPT = bytes(4 * 6)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_req(
    room: int = 1,
    rid: str = "r",
    digest: bytes = b"",
    options: OutputOptions = PLAIN,
    images: Sequence[PlacedImage] = (),
) -> Req:
    source = TransferSource("h", 1, room, digest=digest)
    params = SamplingParams(max_new_tokens=1)
    recv = TokenizedGenerateReqInput(1, rid, PROMPT, params, options, transfer=source, images=list(images))
    req = Req(recv, tokens=bytearray(PROMPT))
    req.held.pages = Pages("i", [4, 5, 6, 7, 8, 9])
    req.num_cached = 2
    return req


def finish(transfers: Any, req: Req, reason: FinishReason) -> None:
    req.finish_reason = reason
    transfers.left(req)


def test_a_decode_waits_for_all_parts_of_its_own_attempt() -> None:
    told: list[PageMessage] = []
    transfers = DecodeTransfers(told.append, 60.0, 2, has_routes=True, clock=Clock())
    req = make_req()
    assert transfers.begin(req) == "" and req.is_awaited and transfers.is_waiting
    assert "another request has it" in transfers.begin(make_req())
    assert transfers.admitted([req]), "the output processor asks for rows, the sooner the better"
    assert told.pop() == FetchPages(TransferSource("h", 1, 1), 1, 2, 6, req.held.pages.tobytes())
    # Retracted and admitted again: what the first attempt brings counts for nothing.
    transfers.left(req)
    assert told.pop() == DropPages("1.0", again=True) and req.is_awaited
    transfers.admitted([req])
    for attempt in (1, 2):
        for part in ("pages1", "routes", "pages0"):
            assert transfers.settle() == []
            transfers.on_notice(TransferNotice("1.0", part, attempt, first=FIRST if part == "pages0" else None))
    (settled,) = transfers.settle()
    assert settled.first == FIRST and not req.is_awaited and not transfers.is_waiting
    assert told.pop() == DropPages("1.0")
    assert transfers.state()["num_transfers"] == 1


def test_a_decode_refuses_pages_of_another_request() -> None:
    """A room that both sides know need not be one request: its pages would be cached as another prompt's."""
    told: list[PageMessage] = []
    transfers = DecodeTransfers(told.append, 60.0, 1, has_routes=False)
    for room, error in ((1, ""), (2, "bytes of rows are missing")):
        req = make_req(room, digest=b"asked here")
        transfers.begin(req)
        transfers.admitted([req])
        first = FirstToken([9], "w", digest=b"asked there")
        transfers.on_notice(TransferNotice(f"{room}.0", "pages0", 1, error, first=first))
        (settled,) = transfers.settle()
        assert settled.first is None and settled.reason is not None
        assert f"bootstrap_room={room} is another request there: prompt, return_logprob" in str(settled.reason.message)
        finish(transfers, req, settled.reason)
    assert not transfers.is_waiting and transfers.state()["num_transfers_failed"] == 2


def test_a_decode_waits_for_log_probabilities_of_the_prompt_where_nobody_records_rows() -> None:
    told: list[PageMessage] = []
    transfers = DecodeTransfers(told.append, 60.0, 1, has_routes=False, clock=Clock())
    plain, scored = make_req(1, "plain"), make_req(2, "scored", options=SCORED)
    for req in (plain, scored):
        transfers.begin(req)
    transfers.admitted([plain, scored])
    for room in (1, 2):
        transfers.on_notice(TransferNotice(f"{room}.0", "pages0", 1, first=FIRST))
    assert [settled.req for settled in transfers.settle()] == [plain]
    transfers.on_notice(TransferNotice("2.0", "routes", 1))
    assert [settled.req for settled in transfers.settle()] == [scored]


def test_a_decode_that_refuses_says_what_else_differs_of_images() -> None:
    transfers = DecodeTransfers(lambda message: None, 60.0, 1, has_routes=False)
    req = make_req(digest=b"asked here", images=[PlacedImage(1, 1, 2, 2, 1, "/nowhere", 0, "float32")])
    transfers.begin(req)
    transfers.admitted([req])
    transfers.on_notice(TransferNotice("1.0", "pages0", 1, first=FirstToken([9], "w", digest=b"asked there")))
    (settled,) = transfers.settle()
    assert settled.reason is not None
    message = "is another request there: prompt, images (and the weights of their --encoder), return_logprob, "
    assert message in str(settled.reason.message)


def test_a_decode_goes_on_without_rows_and_fails_without_pages_or_in_time() -> None:
    told: list[PageMessage] = []
    clock = Clock()
    transfers = DecodeTransfers(told.append, 60.0, 1, has_routes=True, clock=clock)
    without_rows, without_pages, late, lost = (make_req(room, f"r{room}") for room in (1, 2, 3, 4))
    for req in (without_rows, without_pages, late, lost):
        transfers.begin(req)
    transfers.admitted([without_rows, without_pages, lost])
    # Pages without rows would be cached.
    transfers.on_notice(TransferNotice("4.0", "pages0", 1, first=FIRST))
    transfers.on_notice(TransferNotice("4.0", "routes", 1, "cut off", is_lost=True))
    (settled,) = transfers.settle()
    assert settled.req is lost and settled.reason is not None and settled.reason.message == "prefill: cut off"
    finish(transfers, lost, settled.reason)
    transfers.on_notice(TransferNotice("1.0", "routes", 1, "gone"))
    transfers.on_notice(TransferNotice("1.0", "pages0", 1, first=FIRST))
    transfers.on_notice(TransferNotice("2.0", "pages0", 1, "the rank is gone"))
    good, bad = transfers.settle()
    assert good.req is without_rows and good.first == FIRST
    assert bad.req is without_pages and bad.reason is not None
    assert bad.reason.message == "prefill: the rank is gone" and bad.reason.status_code == 500
    finish(transfers, bad.req, bad.reason)
    assert told.pop() == DropPages("2.0", "prefill: the rank is gone")
    clock.now = 61.0
    (settled,) = transfers.settle()
    assert settled.req is late and settled.reason is not None and "within 60 s" in str(settled.reason.message)
    finish(transfers, late, settled.reason)
    assert transfers.state() == {"num_transferring": 0, "num_transfers": 1, "num_transfers_failed": 3}


def commit(
    transfers: PrefillTransfers, req: Req, num: int, token: int | None = None, logprobs: Logprobs | None = None
) -> None:
    req.num_committed = num
    tokens = [] if token is None else [token]
    req.output_ids.extend(tokens)
    assert transfers.committed(req, TokenOutput(req.rid, tokens, logprobs) if tokens or logprobs else None)


def test_what_ends_a_prompt_is_as_large_whatever_its_length() -> None:
    """Leaders handle it on their step threads."""
    told: list[PageMessage] = []
    transfers = PrefillTransfers(told.append, 60.0, lambda: "w", Clock())
    req = make_req(options=SCORED)
    transfers.begin(req)
    commit(transfers, req, 3, logprobs=Logprobs(input=[(-0.5, 7)] * 3, input_ranks=[1] * 3))
    last = Logprobs([-0.25], [[(-0.25, 9)]], [(-0.5, 7)] * 3, [[(-0.5, 7)]] * 3, [1] * 3)
    commit(transfers, req, 6, token=9, logprobs=last)
    (end,) = told[1:]
    assert isinstance(end, SharePages) and end.first == FirstToken([9], "w", Logprobs([-0.25], [[(-0.25, 9)]]))


def test_a_prefill_lends_chunk_by_chunk_until_it_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("waybill.engine.scheduler.prefill_transfers.MIN_EARLY", 2)
    told: list[PageMessage] = []
    transfers = PrefillTransfers(told.append, 60.0, lambda: "w", Clock())
    req = make_req()
    assert transfers.begin(req) == "" and req.is_lent
    assert "another request has it" in transfers.begin(make_req())
    # Much that is cached goes before anything is computed, its rows too.
    assert transfers.admitted([req])
    commit(transfers, req, 4)
    assert not transfers.is_waiting
    commit(transfers, req, 6, token=9)
    pages = req.held.pages.tobytes()
    assert told == [SharePages("1.0", pages, 2), SharePages("1.0", b"", 4), SharePages("1.0", b"", 6, FIRST)]
    assert transfers.is_waiting and transfers.settle() == []
    transfers.on_notice(TransferNotice("1.0", "released"))
    (settled,) = transfers.settle()
    assert settled.reason == FinishReason("length", length=1)
    finish(transfers, req, settled.reason)
    assert isinstance(told.pop(), DropPages) and not req.is_lent and not transfers.is_waiting
    assert transfers.state() == {"num_transferring": 0, "num_transfers": 1, "num_transfers_failed": 0}


def test_a_prefill_that_nobody_fetches_ends() -> None:
    told: list[PageMessage] = []
    clock = Clock()
    transfers = PrefillTransfers(told.append, 60.0, lambda: "w", clock)
    kept, gone, queued = (make_req(room, f"r{room}") for room in (1, 2, 3))
    for req in (kept, gone, queued):
        transfers.begin(req)
    assert not transfers.admitted([kept, gone])
    assert told == []
    commit(transfers, kept, 6, token=9)
    transfers.on_notice(TransferNotice("2.0", "released", error="the caller has left"))
    (settled,) = transfers.settle()
    assert settled.req is gone and settled.reason is not None
    assert settled.reason.type == "abort" and "the caller has left" in str(settled.reason.message)
    finish(transfers, gone, settled.reason)
    clock.now = 61.0
    # One that has not come to its first token is bounded by those before it.
    (settled,) = transfers.settle()
    assert settled.req is kept and settled.reason is not None and settled.reason.status_code == 500
    finish(transfers, kept, settled.reason)
    assert transfers.settle() == [] and transfers.state()["num_transfers_failed"] == 2


def test_a_room_is_for_one_request() -> None:
    """The ranks remember how its last one has ended, and say so to whoever asks for pages of the next one."""
    transfers = PrefillTransfers(lambda message: None, 60.0, lambda: "w", Clock())
    assert MAX_ENDED >= MAX_REMEMBERED
    for room in range(MAX_ENDED + 1):
        req = make_req(room)
        assert transfers.begin(req) == ""
        finish(transfers, req, FinishReason("length", length=1))
    for room in (1, MAX_ENDED):
        req = make_req(room)
        assert transfers.begin(req) == f"bootstrap_room={room}: an earlier request had it; each needs one of its own"
        assert not req.is_lent
    assert transfers.begin(make_req(0)) == "", "the last ones are remembered"
