"""The ledger: the bugs of field notes one by one, then drawn histories against a model that keeps rows by request."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from waybill.engine.io_struct import Segment
from waybill.engine.routing.geometry import RouteGeometry
from waybill.engine.routing.ledger import MissingRoutesError, RouteLedger, RouteSlice

GEOMETRY = RouteGeometry(layer_ids=(1, 2), num_layers_total=3, max_tokens=64, top_k=2, num_experts=256)


def pages(*numbers: int) -> bytes:
    return np.array(numbers, dtype="<i4").tobytes()


def rows_of(first: int, num: int) -> np.ndarray:
    """[M, n, K] rows that tell every token apart."""
    return (np.arange(first, first + num)[None, :, None] * 4 + np.arange(4).reshape(2, 1, 2)).astype(np.uint8)


def make_ledger(page_size: int = 1) -> RouteLedger:
    return RouteLedger(16, page_size, GEOMETRY)


def run_request(ledger: RouteLedger, rid: str, where: tuple[int, ...], first: int, version: str = "v") -> None:
    """Start a request and file one row a page; its rows are those from `first` on."""
    ledger.start(rid, keep=True)
    ledger.admit(rid, b"")
    segment = Segment(rid, 0, len(where), pages(*where))
    ledger.allocate(segment)
    ledger.file(segment, rows_of(first, len(where)), version)


def expect(ledger: RouteLedger, rid: str, start: int, seqlen: int, wanted: np.ndarray) -> None:
    found = ledger.get_topk(rid, start, seqlen)
    assert found.start == min(start, max(seqlen - 1, 0))
    assert found.rows.tobytes() == np.ascontiguousarray(wanted.transpose(1, 0, 2)).tobytes()


def test_slices_are_half_open_absolute_and_clamped() -> None:
    ledger = make_ledger()
    run_request(ledger, "a", (3, 1, 2, 0), 10)
    whole = rows_of(10, 4)
    for start in range(7):
        for seqlen in range(6):
            expect(ledger, "a", start, seqlen, whole[:, start : max(seqlen - 1, 0)])
    with pytest.raises(ValueError, match="routed_experts_start_len=-1 is lower than 0"):
        ledger.get_topk("a", -1, 4)
    with pytest.raises(MissingRoutesError, match="from position 4 on were not filed"):
        ledger.get_topk("a", 0, 6)


def test_a_slice_outlives_the_reuse_of_its_slots() -> None:
    ledger = make_ledger()
    run_request(ledger, "a", (0, 1), 0)
    taken = ledger.get_topk("a", 0, 3)
    ledger.drop("a")
    run_request(ledger, "b", (0, 1), 20)
    assert taken.rows.tobytes() == rows_of(0, 2).transpose(1, 0, 2).tobytes()
    expect(ledger, "b", 0, 3, rows_of(20, 2))


def test_a_slice_is_copied_once() -> None:
    geometry, num_rows = RouteGeometry(tuple(range(32)), 32, 64, 8, 128), 4000
    ledger = RouteLedger(num_rows, 1, geometry)
    ledger.start("a", keep=True)
    ledger.admit("a", b"")
    segment = Segment("a", 0, num_rows, pages(*range(num_rows)))
    ledger.allocate(segment)
    ledger.file(segment, np.ones((32, num_rows, 8), dtype=np.uint8), "v")
    tracemalloc.start()
    rows = ledger.get_topk("a", 0, num_rows + 1).rows
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert not np.shares_memory(rows, ledger._stores[0]._rows)
    assert peak < 1.5 * rows.nbytes


def test_rows_of_a_reused_slot_are_missing_until_written() -> None:
    ledger = make_ledger(page_size=2)
    run_request(ledger, "a", (0, 1), 0)
    ledger.drop("a")
    ledger.start("b", keep=True)
    ledger.admit("b", b"")
    ledger.allocate(Segment("b", 0, 1, pages(0)))
    ledger.file(Segment("b", 0, 1, b""), rows_of(9, 1), "v")
    expect(ledger, "b", 0, 2, rows_of(9, 1))
    with pytest.raises(MissingRoutesError):
        ledger.get_topk("b", 0, 3)


def test_a_cache_hit_finds_rows_that_nobody_asked_for_when_they_were_filed() -> None:
    ledger = make_ledger()
    ledger.start("plain", keep=False)
    ledger.admit("plain", b"")
    segment = Segment("plain", 0, 3, pages(5, 4, 3))
    ledger.allocate(segment)
    ledger.file(segment, rows_of(7, 3), "v")
    ledger.drop("plain")
    ledger.start("opted", keep=True)
    ledger.admit("opted", pages(5, 4))
    more = Segment("opted", 2, 1, pages(9))
    ledger.allocate(more)
    ledger.file(more, rows_of(30, 1), "v")
    expect(ledger, "opted", 0, 4, np.concatenate([rows_of(7, 2), rows_of(30, 1)], axis=1))


def test_first_filed_wins_over_the_rows_of_a_second_prefill() -> None:
    """Retraction frees KV; a re-prefill under new weights routes again. What the tokens were sampled under stands."""
    ledger = make_ledger()
    run_request(ledger, "a", (0, 1, 2), 0, "old")
    ledger.retract("a")
    ledger.admit("a", b"")
    again = Segment("a", 0, 5, pages(8, 9, 10, 11, 12))
    ledger.allocate(again)
    ledger.file(again, rows_of(40, 5), "new")
    found = ledger.get_topk("a", 1, 6)
    assert found.rows.tobytes() == (
        np.concatenate([rows_of(1, 2), rows_of(43, 2)], axis=1).transpose(1, 0, 2).tobytes()
    )
    assert found.weight_versions == [("old", 1, 3), ("new", 3, 5)]
    # The slots hold the rows of the forward whose KV is in them: another request that hits those pages gets these.
    ledger.drop("a")
    ledger.start("b", keep=True)
    ledger.admit("b", pages(8, 9))
    expect(ledger, "b", 0, 3, rows_of(40, 2))


def test_a_request_retracted_twice_keeps_the_first_rows_of_each_position() -> None:
    ledger = make_ledger()
    run_request(ledger, "a", (0, 1), 0)
    ledger.retract("a")
    ledger.admit("a", b"")
    ledger.allocate(Segment("a", 0, 3, pages(4, 5, 6)))
    ledger.file(Segment("a", 0, 3, b""), rows_of(20, 3), "v")
    ledger.retract("a")
    # Aborted while it waits: it has what it had.
    assert ledger.num_rows("a") == 3
    expect(ledger, "a", 0, 4, np.concatenate([rows_of(0, 2), rows_of(22, 1)], axis=1))


def test_a_flush_leaves_no_row_to_hit() -> None:
    ledger = make_ledger()
    run_request(ledger, "a", (0, 1), 0)
    ledger.drop("a")
    ledger.flush()
    ledger.start("b", keep=True)
    ledger.admit("b", pages(0, 1))
    with pytest.raises(MissingRoutesError, match="2 rows are missing, the first at position 0"):
        ledger.get_topk("b", 0, 3)


def test_rows_out_of_order_are_refused() -> None:
    ledger = make_ledger()
    run_request(ledger, "a", (0, 1), 0)
    ledger.allocate(Segment("a", 3, 1, pages(2)))
    with pytest.raises(AssertionError, match="rows from 3, 2 were filed"):
        ledger.file(Segment("a", 3, 1, b""), rows_of(0, 1), "v")


class LedgerMachine(RuleBasedStateMachine):
    """Requests run on pages that come and go. The model keeps, by request, the first row of every position, and, by
    page, the rows that its slots hold."""

    page_size = 2
    num_pages = 12

    def __init__(self) -> None:
        super().__init__()
        self.ledger = RouteLedger(self.num_pages, self.page_size, GEOMETRY)
        self.free = list(range(self.num_pages))
        self.tables: dict[str, list[int]] = {}
        self.filed: dict[str, int] = {}
        self.truth: dict[str, dict[int, tuple[bytes, str]]] = {}
        self.slots: dict[tuple[int, int], tuple[bytes, str]] = {}
        self.counter = 0
        self.version = 0

    @rule()
    def start(self) -> None:
        rid = f"r{self.counter}"
        self.counter += 1
        self.ledger.start(rid, keep=True)
        self.ledger.admit(rid, b"")
        self.tables[rid], self.filed[rid], self.truth[rid] = [], 0, {}

    @rule()
    def new_weights(self) -> None:
        self.version += 1

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), num=st.integers(1, 5))
    def compute(self, data: st.DataObject, num: int) -> None:
        rid = data.draw(st.sampled_from(sorted(self.tables)))
        table, first = self.tables[rid], self.filed[rid]
        missing = -(-(first + num) // self.page_size) - len(table)
        if missing > len(self.free):
            return
        new = [self.free.pop(data.draw(st.integers(0, len(self.free) - 1))) for _ in range(missing)]
        table.extend(new)
        rows = np.frombuffer(data.draw(st.binary(min_size=num * 4, max_size=num * 4)), dtype=np.uint8)
        by_layer = rows.reshape(num, 2, 2).transpose(1, 0, 2)
        segment = Segment(rid, first, num, pages(*new))
        self.ledger.allocate(segment)
        self.ledger.file(segment, by_layer, f"v{self.version}")
        for i in range(num):
            position = first + i
            value = (rows.reshape(num, 4)[i].tobytes(), f"v{self.version}")
            self.slots[table[position // self.page_size], position % self.page_size] = value
            self.truth[rid].setdefault(position, value)
        self.filed[rid] = first + num

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def retract_and_hit(self, data: st.DataObject) -> None:
        """It comes back on a prefix of whole pages that stayed cached, or on none."""
        rid = data.draw(st.sampled_from(sorted(self.tables)))
        table = self.tables[rid]
        kept = data.draw(st.integers(0, self.filed[rid] // self.page_size))
        self.ledger.retract(rid)
        self.free += table[kept:]
        self.tables[rid] = table[:kept]
        self.ledger.admit(rid, pages(*table[:kept]))
        self.filed[rid] = kept * self.page_size

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        rid = data.draw(st.sampled_from(sorted(self.tables)))
        truth = self.truth.pop(rid)
        num = len(truth)
        assert self.ledger.num_rows(rid) == num
        start = data.draw(st.integers(0, num))
        found = self.ledger.get_topk(rid, start, num + 1)
        assert found.rows.tobytes() == b"".join(truth[i][0] for i in range(start, num))
        versions = [name for name, first, last in found.weight_versions for _ in range(first, last)]
        assert versions == [truth[i][1] for i in range(start, num)]
        self.ledger.drop(rid)
        self.free += self.tables.pop(rid)
        del self.filed[rid]


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


@st.composite
def step_of(draw: st.DrawFn) -> list[tuple[str, int, bool]]:
    """Requests of a step: who, how many rows, whether it overran."""
    rids = draw(st.lists(st.sampled_from("abcd"), min_size=1, unique=True))
    return [(rid, draw(st.sampled_from((1, 1, 2, 5))), draw(st.booleans())) for rid in rids]


@given(
    st.lists(step_of(), max_size=6), st.integers(1, 4), st.sampled_from([(1, 1), (2, 2), (3, 8), (2, 5)]), st.booleans()
)
def test_filing_a_step_at_once_equals_filing_its_segments(
    steps: list[list[tuple[str, int, bool]]], page_size: int, shape: tuple[int, int], wide: bool
) -> None:
    """`file_step` against `allocate` and `file` one by one: every page's rows and versions, whatever is discarded."""
    num_layers, top_k = shape
    geometry = RouteGeometry(tuple(range(num_layers)), num_layers, 64, top_k, 512 if wide else 128)
    num_pages, rng = 200, np.random.default_rng(0)
    fast, slow = (RouteLedger(num_pages, page_size, geometry) for _ in range(2))
    free, filed = iter(rng.permutation(num_pages)), dict.fromkeys("abcd", 0)
    for ledger in (fast, slow):
        for rid in filed:
            ledger.start(rid, keep=True)
            ledger.admit(rid, b"")
    for number, step in enumerate(steps):
        segments = []
        for rid, num_tokens, is_discarded in step:
            start = filed[rid]
            missing = -(-(start + num_tokens) // page_size) - -(-start // page_size)
            new_pages = pages(*(next(free) for _ in range(missing)))
            # Who overran is gone: its rid is nobody's by then.
            rid, is_discarded = (f"gone {rid}", True) if is_discarded else (rid, False)
            segments.append(Segment(rid, start, num_tokens, new_pages, is_discarded))
            filed.update({} if is_discarded else {rid: start + num_tokens})
        num_rows = sum(segment.num_tokens for segment in segments)
        slot = rng.integers(0, geometry.num_experts, (num_layers, num_rows + 3, top_k)).astype(geometry.dtype)
        rows, version, first = slot[:, 2 : 2 + num_rows], f"v{number // 2}", 0
        num_filed = fast.file_step(segments, rows, version)
        for segment in segments:
            slow.allocate(segment)
            if not segment.discarded:
                slow.file(segment, rows[:, first : first + segment.num_tokens], version)
                num_filed -= segment.num_tokens
            first += segment.num_tokens
        assert num_filed == 0
    for rid, seqlen in filed.items():
        ours, twins = (ledger.get_topk(rid, 0, seqlen + 1) for ledger in (fast, slow))
        assert ours.rows.dtype == twins.rows.dtype and np.array_equal(ours.rows, twins.rows)
        assert ours.weight_versions == twins.weight_versions and len(ours.rows) == seqlen


def test_a_short_slice_of_a_snapshot_does_not_keep_it_alive() -> None:
    ledger = make_ledger()
    run_request(ledger, "a", (0, 1, 2, 3), 0)
    ledger.retract("a")
    rows = ledger.get_topk("a", 2, 4).rows
    assert rows.base is None and np.array_equal(rows, rows_of(2, 1).transpose(1, 0, 2))


def test_rows_of_another_engine_are_filed_as_if_they_had_been_made_here() -> None:
    there, here = make_ledger(page_size=2), make_ledger(page_size=4)
    there.start("a", keep=True)
    there.admit("a", b"")
    for start, version in ((0, "old"), (4, "new")):
        segment = Segment("a", start, 4 - (start > 0), pages(start + 1, start))
        there.allocate(segment)
        there.file(segment, rows_of(start, segment.num_tokens), version)
    sent = there.get_topk("a", 0, 8)
    # The first page was cached here, with rows of its own.
    run_request(here, "b", (9,), 50)
    here.file(Segment("b", 1, 3, b""), rows_of(51, 3), "v")
    here.start("a", keep=True)
    here.admit("a", pages(9))
    assert here.num_on_pages("a") == 4
    part = RouteSlice(4, sent.rows[4:], [("new", 4, 7)])
    assert here.adopt("a", pages(3), 3, part) == 3
    found = here.get_topk("a", 0, 8)
    assert found.rows[:4].tobytes() == here.get_topk("b", 0, 5).rows.tobytes()
    assert found.rows[4:].tobytes() == sent.rows[4:].tobytes()
    assert found.weight_versions == [("v", 0, 4), ("new", 4, 7)]
    # It goes on here, and whoever hits its pages has its rows.
    here.file(Segment("a", 7, 1, b""), rows_of(7, 1), "v")
    here.start("c", keep=True)
    here.admit("c", pages(9, 3))
    assert here.get_topk("c", 5, 9).weight_versions == [("new", 5, 7), ("v", 7, 8)]


def test_rows_of_another_engine_that_did_not_come_are_missing_for_all_who_hit_their_pages() -> None:
    ledger = make_ledger()
    run_request(ledger, "old", (4, 5), 90)
    ledger.start("a", keep=True)
    ledger.admit("a", b"")
    assert ledger.adopt("a", pages(4, 5), 2, None) == 0
    ledger.start("b", keep=True)
    ledger.admit("b", pages(4, 5))
    for rid in ("a", "b"):
        with pytest.raises(MissingRoutesError, match="2 rows are missing, the first at position 0"):
            ledger.get_topk(rid, 0, 3)
