"""Rows and log-probabilities of a prompt on their way between output processors: in parts, as they are filed."""

from __future__ import annotations

import os
import queue
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engine_pair import HOST, free_port

from waybill.engine.disaggregation import route_server
from waybill.engine.disaggregation.prompt_rows import PromptRows, Versions
from waybill.engine.disaggregation.route_client import ArrivingRoutes, RouteJob
from waybill.engine.disaggregation.route_server import OfferedRoutes
from waybill.engine.disaggregation.transfer_client import TransferClient
from waybill.engine.disaggregation.transfer_server import TransferServer
from waybill.engine.disaggregation.wire import Answer, Ended, Fetch, FetchRoutes, Routes, Welcome
from waybill.engine.io_struct import Logprobs, TransferSource
from waybill.engine.ipc.frontend_messages import TransferNotice
from waybill.engine.ipc.sockets import CurveKeys, Endpoint
from waybill.engine.routing.geometry import RouteGeometry
from waybill.engine.routing.ledger import RouteSlice

GEOMETRY = RouteGeometry((1, 2), 3, 8, 2, 16, weights_dtype="float32")
# Ids of 2 layers, 2 each, and their weights.
ROW_BYTES = 4 + 16
NUM = 12
WHOLE = RouteSlice(
    0,
    np.arange(NUM * 4, dtype=np.uint8).reshape(NUM, 2, 2),
    [("old", 0, 5), ("new", 5, NUM)],
    np.arange(NUM * 4, dtype="<f4").reshape(NUM, 2, 2),
)
SCORES = Logprobs(
    input=[(None, 7), *((-float(n), n) for n in range(1, NUM))],
    input_top=[None, *([(-0.5, n)] for n in range(1, NUM))],
    input_ranks=[None, *range(1, NUM)],
)


def part(start: int, end: int) -> RouteSlice:
    rows = PromptRows(GEOMETRY, 0, NUM)
    rows.add(WHOLE)
    return rows.cut(start, end)


def assert_rows(found: RouteSlice | None, start: int = 0) -> None:
    expected = part(start, NUM)
    assert found is not None and found.weights is not None and expected.weights is not None
    assert found.start == start and found.weight_versions == expected.weight_versions
    assert found.rows.dtype == np.uint8 and found.rows.tobytes() == expected.rows.tobytes()
    assert found.weights.tobytes() == expected.weights.tobytes()


class Counted(OfferedRoutes):
    """Keeps what it has answered."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[Answer] = []

    def answer(self, fetch: Fetch) -> tuple[Answer, Sequence[memoryview]] | None:
        found = super().answer(fetch)
        if found is not None:
            self.answers.append(found[0])
        return found


@dataclass
class Sides:
    """The output processors of both, with real sockets."""

    keys: CurveKeys = field(default_factory=CurveKeys.make)
    port: int = field(default_factory=free_port)
    timeout_s: float = 30.0
    notices: queue.SimpleQueue[TransferNotice] = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        self.offered = Counted()
        address = f"tcp://{HOST}:{self.port}"
        welcome = Welcome("one", [], address)
        self.server = TransferServer(Endpoint(address, self.keys), "one", self.offered, self.timeout_s, welcome=welcome)
        self.offered.wake = self.server.wake
        self.server.start()
        client = TransferClient(self.keys, {})
        self.arriving = ArrivingRoutes(client, lambda _, notice: self.notices.put(notice))
        client.start()

    def begin(self, key: str = "1.0") -> None:
        self.offered.begin(key, PromptRows(GEOMETRY, 0, NUM))

    def fetch(self, start: int = 0, attempt: int = 1, num_scores: int = 0, room: int = 1) -> None:
        source = TransferSource(HOST, self.port, room)
        self.arriving.fetch(source, 0, attempt, PromptRows(GEOMETRY, start, NUM), num_scores)

    def notice(self) -> TransferNotice:
        return self.notices.get(timeout=20)

    def take(self) -> RouteJob:
        found = self.arriving.take("1.0")
        assert found is not None
        return found

    def until_answered(self, num: int) -> None:
        until(lambda: len(self.offered.answers) >= num)

    def spans(self) -> list[tuple[int, int]]:
        return [(one.start, one.end) for one in self.offered.answers if isinstance(one, Routes)]


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch) -> Sides:
    monkeypatch.setattr(route_server, "ANSWER_BYTES", 4 * ROW_BYTES)
    monkeypatch.setattr(route_server, "ANSWER_SCORES", 5)
    return Sides()


def test_rows_come_as_they_are_filed_a_few_in_an_answer_and_none_that_is_known(sides: Sides) -> None:
    """Also where the question is there before the prompt."""
    sides.fetch(start=2)
    sides.begin()
    sides.offered.add_rows("1.0", part(0, 3))
    sides.until_answered(1)
    sides.offered.add_rows("1.0", part(3, 4))
    sides.until_answered(2)
    assert sides.notices.empty() and sides.arriving.take("1.0") is None
    sides.offered.add_rows("1.0", part(4, NUM))
    assert sides.notice() == TransferNotice("1.0", "routes", 1)
    assert sides.spans() == [(2, 3), (3, 4), (4, 8), (8, 12)]
    assert_rows(sides.take().rows, 2)
    assert sides.arriving.take("1.0") is None


def test_rows_of_a_long_prompt_come_a_mebibyte_in_an_answer() -> None:
    """Of 48 layers, 8 ids each, in bytes: 384 of a position."""
    sides, num, geometry = Sides(), 6000, RouteGeometry(tuple(range(48)), 48, 8, 8, 128)
    rows = np.random.default_rng(0).integers(0, 128, (num, 48, 8), dtype=np.uint8)
    sides.offered.begin("1.0", PromptRows(geometry, 0, num))
    for start in range(0, num, 2048):
        chunk = rows[start : start + 2048]
        sides.offered.add_rows("1.0", RouteSlice(start, chunk, [(f"v{start}", start, start + len(chunk))]))
    sides.arriving.fetch(TransferSource(HOST, sides.port, 1), 0, 1, PromptRows(geometry, 1, num), 0)
    assert sides.notice().error == ""
    found = sides.take().rows
    assert found is not None and np.array_equal(found.rows, rows[1:])
    assert found.weight_versions == [("v0", 1, 2048), ("v2048", 2048, 4096), ("v4096", 4096, num)]
    most = (1 << 20) // 384
    assert sides.spans() == [(1, 1 + most), (1 + most, 1 + 2 * most), (1 + 2 * most, num)]


def test_log_probabilities_come_beside_rows_or_without_them(sides: Sides) -> None:
    sides.begin()
    sides.offered.add_scores("1.0", SCORES.of_prompt(0, 7))
    sides.offered.add_rows("1.0", part(0, NUM))
    sides.fetch(num_scores=NUM)
    sides.until_answered(3)
    # A step's outputs follow its rows; what belongs to the sampled token goes with that.
    last = SCORES.of_prompt(7, NUM)
    last.output.append(-3.0)
    sides.offered.add_scores("1.0", last)
    assert sides.notice().error == ""
    found = sides.take()
    assert_rows(found.rows)
    assert found.scores == SCORES
    sides.offered.begin("2.0", None)
    sides.offered.add_scores("2.0", SCORES)
    sides.arriving.fetch(TransferSource(HOST, sides.port, 2), 0, 1, None, NUM)
    assert sides.notice() == TransferNotice("2.0", "routes", 1)
    arrived = sides.arriving.take("2.0")
    assert arrived is not None and arrived.rows is None and arrived.scores == SCORES
    sizes = [len(one.scores.input) for one in sides.offered.answers if isinstance(one, Routes) and one.scores]
    assert max(sizes) == 5


def test_samples_of_a_room_and_a_prompt_asked_twice_have_all_rows_each(sides: Sides) -> None:
    for sample in (0, 1):
        sides.begin(f"1.{sample}")
        sides.offered.add_rows(f"1.{sample}", part(0, NUM))
        source = TransferSource(HOST, sides.port, 1, sample)
        sides.arriving.fetch(source, 0, 1, PromptRows(GEOMETRY, 0, NUM), 0)
    for _ in (0, 1):
        found = sides.arriving.take(sides.notice().key)
        assert found is not None
        assert_rows(found.rows)


def test_rows_that_the_other_side_has_not_are_no_loss_and_log_probabilities_come_nevertheless(sides: Sides) -> None:
    sides.begin()
    sides.offered.add_rows("1.0", part(0, 3))
    sides.fetch(num_scores=NUM)
    sides.until_answered(1)
    sides.offered.miss_rows("1.0", "1 rows are missing")
    sides.offered.add_scores("1.0", SCORES)
    assert sides.notice() == TransferNotice("1.0", "routes", 1, "1 rows are missing")
    found = sides.take()
    assert found.rows is None and found.scores == SCORES
    assert sides.arriving.num_failed == 1


def test_a_prompt_that_ends_between_two_answers_is_lost_and_so_is_its_room(sides: Sides) -> None:
    """Nothing of another request follows what has come of this one."""
    for again in (False, True):
        sides.begin()
        sides.offered.add_rows("1.0", part(0, 3))
        num_answers = len(sides.offered.answers)
        sides.fetch()
        sides.until_answered(num_answers + 1)
        if again:
            with sides.offered._lock:
                # Not yet told: the question waits.
                del sides.offered._offered["1.0"]
            sides.begin()
            sides.offered.add_rows("1.0", part(0, NUM))
        else:
            sides.offered.drop("1.0", "not finite")
        error = "the prefill's side has let go of it" if again else "not finite"
        assert sides.notice() == TransferNotice("1.0", "routes", 1, error, is_lost=True)
        assert sides.arriving.take("1.0") is None


def test_a_connection_that_ends_between_two_answers_loses_the_rows_and_another_attempt_has_them(sides: Sides) -> None:
    sides.begin()
    sides.offered.add_rows("1.0", part(0, 3))
    sides.fetch()
    sides.until_answered(1)
    # The answer has arrived, as the next question waits.
    until(lambda: bool(sides.server._waiting))
    for connection in psutil.Process().net_connections("tcp"):
        if connection.raddr and connection.raddr.port == sides.port:
            with socket.socket(fileno=os.dup(connection.fd)) as own:
                own.shutdown(socket.SHUT_RDWR)
    notice = sides.notice()
    assert "the connection has ended" in notice.error and notice.is_lost
    sides.offered.add_rows("1.0", part(3, NUM))
    sides.fetch(attempt=2)
    assert sides.notice() == TransferNotice("1.0", "routes", 2)
    assert_rows(sides.take().rows)


def test_who_drops_a_prompt_in_its_middle_keeps_nothing_and_may_ask_again(sides: Sides) -> None:
    """As a retraction does: what was on its way for the first attempt counts for nothing."""
    sides.begin()
    sides.offered.add_rows("1.0", part(0, 3))
    sides.fetch()
    sides.until_answered(1)
    sides.arriving.drop("1.0")
    assert not sides.arriving._jobs and not sides.arriving._arrived
    sides.fetch(start=1, attempt=2)
    sides.offered.add_rows("1.0", part(3, NUM))
    assert sides.notice() == TransferNotice("1.0", "routes", 2)
    assert_rows(sides.take().rows, 1)
    assert sides.notices.empty()


def test_a_prefill_that_does_not_come_to_it_and_one_that_has_been_started_anew(sides: Sides) -> None:
    late = Sides(timeout_s=0.2)
    late.begin()
    late.fetch()
    notice = late.notice()
    assert "has not come to it within 0.2 s" in notice.error and notice.is_lost
    sides.begin()
    sides.server._incarnation = "two"
    sides.fetch()
    assert "started anew" in sides.notice().error


def first_answer(offered: OfferedRoutes, rows: tuple[int, int], scores: tuple[int, int], lease: int = 0) -> Answer:
    found = offered.answer(FetchRoutes("one", "1.0", 1, rows, scores, lease))
    assert found is not None
    return found[0]


def test_nobody_is_answered_with_what_was_not_asked_for() -> None:
    offered = OfferedRoutes()
    assert offered.answer(FetchRoutes("one", "1.0", 1, (0, NUM))) is None
    offered.begin("1.0", PromptRows(GEOMETRY, 0, NUM))
    offered.add_rows("1.0", part(0, 6))
    offered.add_scores("1.0", SCORES)
    # Of a prompt that is longer there, or was asked for more.
    for rows, scores in (((6, NUM), (0, 0)), ((6, 6), (0, 0)), ((4, 4), (NUM, NUM + 3)), ((8, 9), (3, 3))):
        assert offered.answer(FetchRoutes("one", "1.0", 1, rows, scores)) is None
    answer = first_answer(offered, (4, 5), (0, 2))
    assert isinstance(answer, Routes) and (answer.start, answer.end, answer.scores) == (4, 5, SCORES.of_prompt(0, 2))
    assert answer.weight_versions == [("old", 4, 5)]
    assert isinstance(first_answer(offered, (0, 9), (0, 0), lease=answer.lease + 1), Ended)


BAD: list[tuple[int, Versions, int, str]] = [
    (NUM + 1, [("v", 2, NUM + 1)], 0, "rows 2 .. 13 have arrived of those before 12"),
    (2, [], 0, "rows 2 .. 2 have arrived"),
    (5, [("v", 2, 5)], 1, "bytes of rows 2 .. 5 have arrived in place of"),
    (5, [], 0, "weight versions of others"),
    (5, [("v", 2, 4)], 0, "weight versions of others"),
    (5, [("v", 0, 5)], 0, "weight versions of others"),
    (5, [("v", 2, 3), ("w", 4, 5)], 0, "weight versions of others"),
    (5, [("v", 2, 2), ("w", 2, 5)], 0, "weight versions of no rows"),
]


@pytest.mark.parametrize(("end", "versions", "more", "why"), BAD)
def test_what_is_not_the_next_rows_is_refused(end: int, versions: Versions, more: int, why: str) -> None:
    rows = PromptRows(GEOMETRY, 1, NUM)
    rows.add(part(1, 2))
    frames = [memoryview(bytes((end - 2) * size + more)) for size in (4, 16)]
    with pytest.raises(ValueError, match=why):
        rows.add_frames(end, versions, frames)
    assert rows.end == 2


def test_answers_that_bring_nothing_or_too_much_end_the_job() -> None:
    def take(answer: Answer, *, rows: bool = False) -> None:
        source = TransferSource(HOST, 1, 1)
        job = RouteJob(source, 1, PromptRows(GEOMETRY, 0, NUM) if rows else None, 3, lambda *_: None)
        job.begin(Welcome("one", [], "there"))
        job.take("there", answer, [])

    with pytest.raises(ValueError, match="nothing in it"):
        take(Routes("1.0", 1, 1, 0, 0))
    with pytest.raises(ValueError, match="4 log-probabilities of the prompt have arrived, of 3 in all"):
        take(Routes("1.0", 1, 1, 0, 0, scores=SCORES.of_prompt(0, 4)))
    with pytest.raises(ValueError, match="rows from position 1 on have arrived, which were not asked for"):
        take(Routes("1.0", 1, 1, 1, 2), rows=True)
    with pytest.raises(ValueError, match="which were not asked for"):
        take(Routes("1.0", 1, 1, 0, 2))


@settings(max_examples=60, deadline=None)
@given(
    filed=st.lists(st.integers(1, 5), min_size=1, max_size=NUM),
    start=st.integers(0, NUM - 1),
    rows_an_answer=st.integers(1, 5),
    scores_an_answer=st.integers(1, 7),
    asks_between=st.booleans(),
)
def test_in_whatever_parts_they_come_they_are_the_same(
    filed: list[int], start: int, rows_an_answer: int, scores_an_answer: int, asks_between: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(route_server, "ANSWER_BYTES", rows_an_answer * ROW_BYTES)
        patch.setattr(route_server, "ANSWER_SCORES", scores_an_answer)
        offered = OfferedRoutes()
        offered.begin("1.0", PromptRows(GEOMETRY, 0, NUM))
        job = RouteJob(TransferSource(HOST, 1, 1), 1, PromptRows(GEOMETRY, start, NUM), NUM, lambda *_: None)
        question: Fetch | None = job.begin(Welcome("one", [], "there"))["there"]
        bounds = [*(min(NUM, bound) for bound in np.cumsum(filed).tolist()), NUM]
        for first, last in zip([0, *bounds], bounds, strict=False):
            if first < last:
                offered.add_rows("1.0", part(first, last))
                offered.add_scores("1.0", SCORES.of_prompt(first, last))
            while question is not None and (asks_between or last == NUM):
                found = offered.answer(question)
                if found is None:
                    break
                assert sum(frame.nbytes for frame in found[1]) <= rows_an_answer * ROW_BYTES
                question = job.take("there", *found)
        assert question is None
        assert_rows(job.rows, start)
        assert job.scores == SCORES
