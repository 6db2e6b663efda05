"""Leaders that agree before every step, sleep and wake, as pure state machines: messages between the processes are delayed
and interleaved as hypothesis likes. Real schedulers, mailboxes, link, output processor, ledgers and ring."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.dp_harness import DpGroup
from support.replica_harness import Replica, expected_output

from waybill.engine.config import EngineConfig
from waybill.engine.io_struct import SamplingParams
from waybill.engine.scheduler import scheduler as scheduler_module
from waybill.engine.scheduler.transfers import NoTransfers

PAGE_SIZE = 4
# A request's rid ends with how long it answers; "p" is a prefill alone, "x" never stops.
MAX_NEW = {"s": 3, "m": 9, "l": 14, "p": 0, "x": 14}
# Often one of these comes early, while the next step is in flight already.
STOPS = (0, 7, 14, 21, 28, 35, 42)


def make_group(dp_size: int = 2, num_pages: int = 64, **fields: Any) -> DpGroup:
    defaults: dict[str, Any] = {
        "model_path": "",
        "dp_size": dp_size,
        "tp_size": 1,
        "page_size": PAGE_SIZE,
        "max_running_requests": 4,
        "overlap_depth": 1,
        "chunked_prefill_size": 16,
        "enable_return_routed_experts": True,
        "routing_ring_slots": 3,
    }
    return DpGroup(EngineConfig(**(defaults | fields)), num_pages)


class WaitsForPages(NoTransfers):
    """A request is on its way from another engine."""

    is_waiting = True


def test_who_waits_for_pages_does_not_hold_up_ranks_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives its processor away between two looks, but not while the others' steps need its part in them."""
    group, sleeps = make_group(overlap_depth=0), []
    monkeypatch.setattr(scheduler_module.time, "sleep", sleeps.append)
    group.leaders[1].scheduler._transfers = WaitsForPages()
    group.frontend.submit(0, "l", list(range(8)), max_new_tokens=14, ignore_eos=True)
    for leader in group.leaders:
        leader.wire.arrive(1)
    busy = [0, 0]
    for _ in range(200):
        asleep_before = len(sleeps)
        for leader in group.leaders:
            leader.turn()
        group.file_all()
        has_tokens = bool(group.leaders[1].scheduler.lockstep.agreement.num_tokens)
        busy[0] += has_tokens
        busy[1] += len(sleeps) - asleep_before
        if group.frontend.answers["l"].reason is not None:
            break
    assert busy[0] > 10 and busy[1] <= 3, "before the first step, and around the last one"


def params_of(rid: str) -> dict[str, Any]:
    kind = rid.split("-")[-1]
    stops = {"ignore_eos": True} if kind == "x" else {"stop_token_ids": STOPS}
    return {"max_new_tokens": MAX_NEW[kind], **stops}


def submit(group: DpGroup, dp_rank: int, rid: str, prompt: list[int], start: int = 0, *, stream: bool = False) -> None:
    group.frontend.submit(dp_rank, rid, prompt, start, stream_routes=stream, **params_of(rid))


def serial_answer(rid: str, prompt: list[int]) -> list[int]:
    """What the request answers when it runs alone."""
    params = params_of(rid)
    tokens = expected_output(prompt, params["max_new_tokens"], ignore_eos=True)
    for index, token in enumerate(tokens):
        if token in params.get("stop_token_ids", ()):
            return tokens[: index + 1]
    return tokens


def check_answers(group: DpGroup) -> None:
    """Tokens are those of a serial run, rows those of the forwards that routed them; an abort has a part of both."""
    for rid, answer in group.frontend.answers.items():
        assert answer.reason is not None, f"{rid} has no end"
        assert answer.error is None
        expected = serial_answer(rid, answer.prompt)
        if answer.reason.type == "abort":
            assert answer.token_ids == expected[: len(answer.token_ids)]
        else:
            assert answer.token_ids == expected
        assert answer.routed.tolist() == group.expected_rows(rid).tolist()


def check_control(group: DpGroup) -> None:
    """Every control operation took effect at the same step on all leaders, in the order of the numbers."""
    first = group.leaders[0].applied
    assert [applied.number for applied in first] == sorted(applied.number for applied in first)
    for leader in group.leaders:
        assert leader.applied == first


def check_pages(group: DpGroup) -> None:
    for leader in group.leaders:
        assert len(leader.scheduler.queues) == 0
        leader.pages.check_integrity()


def check_flushes(group: DpGroup, op_ids: list[str]) -> None:
    """Answered once each, by success exactly if nobody had requests: none that came before it, and none at all."""
    replies = group.replies()
    flushes = [applied for applied in group.leaders[0].applied if applied.kind == "FlushCache"]
    assert len(flushes) == len(op_ids)
    for op_id, applied in zip(op_ids, flushes, strict=True):
        assert replies[op_id].success == (not applied.alive)
        assert all(number < applied.number for number in applied.alive), "refused for the sake of a later request"


# --- examples -----------------------------------------------------------------------------------------------------------


def test_a_request_on_one_rank_is_joined_by_the_other_and_all_sleep_again() -> None:
    group = make_group()
    group.run_until_rest()
    assert all(leader.rests for leader in group.leaders)
    submit(group, 1, "r-m", [1, 2, 3])
    group.run_until_rest()
    check_answers(group)
    group.check_records()
    assert len(group.leaders[0].runner.forwards) >= len(group.frontend.answers["r-m"].token_ids)
    assert all(leader.rests for leader in group.leaders)


def test_nobody_sleeps_before_all_have_the_last_number() -> None:
    group = make_group()
    group.run_until_rest()
    submit(group, 1, "r-s", [1, 2, 3])
    group.leaders[0].wire.arrive(1)
    for _ in range(5):
        group.leaders[0].turn()
        group.leaders[1].turn()
    assert group.leaders[0].proposal is not None, "it has seen a number that the sleeper has not, and waits"
    assert group.leaders[1].rests
    group.run_until_rest()
    check_answers(group)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_question_wakes_nobody(depth: int) -> None:
    group = make_group(overlap_depth=depth)
    group.run_until_rest()
    agreements = [leader.num_agreements for leader in group.leaders]
    group.frontend.ask(1, "q")
    group.run_until_rest()
    assert group.replies()["q"].state["num_running"] == 0
    assert [leader.num_agreements for leader in group.leaders] == agreements


def test_a_flush_waits_for_the_last_leader_and_for_what_came_before() -> None:
    group = make_group()
    submit(group, 0, "r-x", list(range(1, 20)))
    group.frontend.flush("early")
    group.leaders[0].wire.arrive(2)
    for _ in range(50):
        for leader in group.leaders:
            leader.turn()
    assert not group.replies(), "the other leader has not got it"
    group.run_until_rest()
    group.frontend.flush("late")
    group.run_until_rest()
    replies = group.replies()
    check_control(group)
    check_pages(group)
    check_answers(group)
    assert replies["late"].success
    assert replies["early"].success == (not group.leaders[0].applied[0].alive)


def test_retraction_on_one_rank_leaves_the_other_alone() -> None:
    group = make_group(num_pages=10, chunked_prefill_size=64)
    for index in range(4):
        submit(group, 0, f"a{index}-x", [index + 1] * 5)
    submit(group, 1, "b-x", [9] * 5)
    group.run_until_rest()
    retractions = [leader.scheduler.state()["num_retractions"] for leader in group.leaders]
    assert retractions[0] > 0 and retractions[1] == 0
    check_answers(group)
    check_pages(group)
    group.check_records()


def test_a_shutdown_is_the_last_thing_on_all_leaders_at_once() -> None:
    group = make_group(dp_size=3)
    submit(group, 2, "r-x", [1, 2, 3])
    group.frontend.shut_down()
    group.run_until_rest()
    assert all(leader.has_left for leader in group.leaders)
    check_control(group)
    assert len({leader.num_agreements for leader in group.leaders}) == 1


# --- any order ------------------------------------------------------------------------------------------------------------

REQUESTS = st.tuples(
    st.integers(1, 30), st.integers(0, 3), st.sampled_from("smllxxp"), st.integers(0, 3), st.booleans()
)
RANKS = st.integers(0, 2)
SUBMIT = st.tuples(st.just("submit"), RANKS, st.lists(REQUESTS, min_size=1, max_size=5))
ARRIVE = st.tuples(st.just("arrive"), RANKS, st.integers(1, 8))
TURNS = st.tuples(st.just("turns"), RANKS, st.integers(1, 6))
ALL_TURN = st.tuples(st.just("all turn"), st.integers(1, 20))
FILE = st.tuples(st.just("file"), RANKS, st.integers(1, 20))
OTHERS = st.one_of(
    st.tuples(st.just("abort"), st.integers(0, 20)),
    st.tuples(st.just("abort"), st.integers(0, 20)),
    st.tuples(st.just("abort all")),
    st.tuples(st.just("flush")),
    st.tuples(st.just("ask"), RANKS),
    st.tuples(st.just("rest")),
)
ACTIONS = st.one_of(SUBMIT, SUBMIT, ARRIVE, ARRIVE, TURNS, ALL_TURN, ALL_TURN, FILE, OTHERS)


class Driver:
    """Does what hypothesis drew."""

    def __init__(self, group: DpGroup) -> None:
        self.group = group
        self.num_submitted = 0
        self.flushes: list[str] = []
        self.questions: list[str] = []

    def submit(self, dp_rank: int, length: int, family: int, size: str, start: int, stream: bool) -> None:
        prompt = [family + 1] * (length // 2) + [self.num_submitted % 40 + 1] * (length - length // 2)
        rid = f"r{self.num_submitted}-{size}"
        submit(self.group, dp_rank, rid, prompt, min(start * length // 2, length), stream=stream)
        self.num_submitted += 1

    def do(self, action: tuple[Any, ...]) -> None:
        group, dp_size = self.group, self.group.config.dp_size
        kind, *values = action
        if kind == "submit":
            rank, requests = values
            for request in requests:
                self.submit(rank % dp_size, *request)
        elif kind == "abort":
            group.frontend.abort(f"r{values[0]}-")
        elif kind == "abort all":
            group.frontend.abort(abort_all=True)
        elif kind == "flush":
            self.flushes.append(f"flush {len(self.flushes)}")
            group.frontend.flush(self.flushes[-1])
        elif kind == "ask":
            self.questions.append(f"question {len(self.questions)}")
            group.frontend.ask(values[0] % dp_size, self.questions[-1])
        elif kind == "arrive":
            group.leaders[values[0] % dp_size].wire.arrive(values[1])
        elif kind == "turns":
            for _ in range(values[1]):
                group.leaders[values[0] % dp_size].turn()
        elif kind == "all turn":
            for _ in range(values[0]):
                for leader in group.leaders:
                    leader.turn()
        elif kind == "file":
            group.file(values[0] % dp_size, values[1])
        else:
            group.run_until_rest()


@settings(max_examples=150, deadline=None)
@given(
    actions=st.lists(ACTIONS, min_size=15, max_size=60),
    dp_size=st.integers(2, 3),
    depth=st.integers(0, 1),
    chunk=st.sampled_from([1, 5, 16, -1]),
    num_pages=st.sampled_from([12, 20, 64]),
    cache=st.booleans(),
    tp_size=st.integers(1, 2),
)
def test_any_order_of_messages(
    actions: list[tuple[Any, ...]], dp_size: int, depth: int, chunk: int, num_pages: int, cache: bool, tp_size: int
) -> None:
    group = make_group(
        dp_size,
        num_pages,
        overlap_depth=depth,
        chunked_prefill_size=chunk,
        enable_prefix_cache=cache,
        tp_size=tp_size,
        # As few as are legal: rank 0 waits for filing as often as can be.
        routing_ring_slots=depth + 1,
    )
    driver = Driver(group)
    for action in actions:
        driver.do(action)
    group.run_until_rest()
    # Every request has ended, everybody sleeps, and nothing was lost on the way.
    assert all(leader.rests for leader in group.leaders)
    check_answers(group)
    check_control(group)
    check_flushes(group, driver.flushes)
    check_pages(group)
    group.check_records()
    replies = group.replies()
    assert replies.keys() == {*driver.flushes, *driver.questions}
    for question in driver.questions:
        assert replies[question].success
    # One more round: a sleep is never the last one.
    submit(group, dp_size - 1, "again-s", [7, 8])
    group.frontend.flush("refused or not")
    group.run_until_rest()
    group.frontend.flush("accepted")
    group.run_until_rest()
    assert group.replies()["accepted"].success
    check_answers(group)
    group.frontend.shut_down()
    group.leaders[0].wire.arrive(1)
    driver.do(("all turn", 4))
    assert not any(leader.has_left for leader in group.leaders), "nobody leaves those who do not know yet"
    group.run_until_rest()
    assert all(leader.has_left for leader in group.leaders)
    check_control(group)
    group.check_records()


@settings(max_examples=40, deadline=None)
@given(actions=st.lists(ACTIONS, min_size=10, max_size=30), depth=st.integers(0, 1))
def test_a_group_of_one_does_what_a_replica_alone_does(actions: list[tuple[Any, ...]], depth: int) -> None:
    group = make_group(1, 20, overlap_depth=depth)
    driver = Driver(group)
    for action in actions:
        driver.do(action)
    group.run_until_rest()
    check_flushes(group, driver.flushes)
    check_pages(group)
    alone = Replica(group.config, 20, context_length=256)
    for rid, answer in group.frontend.answers.items():
        alone.submit(rid, answer.prompt, SamplingParams(**params_of(rid)))
    alone.run_until_idle()
    for rid, answer in group.frontend.answers.items():
        assert answer.reason is not None
        if answer.reason.type != "abort":
            assert answer.token_ids == alone.outputs[rid]
