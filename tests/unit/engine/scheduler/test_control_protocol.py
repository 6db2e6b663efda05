"""Pauses, updates and holds among several leaders, with every message delayed: nothing runs while it must not, operations
take effect at one step, and rows carry the version under which they were first computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.dp_harness import DpGroup, Leader

from waybill.engine.config import EngineConfig
from waybill.engine.control.blocked import Blocked, BlockedKind
from waybill.engine.control.operations import (
    ContinueGeneration,
    ControlOperation,
    DestroyWeightsUpdateGroup,
    PauseGeneration,
    ReleaseMemoryOccupation,
    UpdateWeightsFromDisk,
    UpdateWeightsFromDistributed,
)
from waybill.engine.ipc.frontend_messages import ControlReq
from waybill.engine.plan import ScheduleBatch
from waybill.engine.weight_sync.report import Outcome

PAGE = 2
INCOMPLETE = Blocked(BlockedKind.INCOMPLETE, "weights: an update is not complete")


@dataclass
class FakeOperations:
    """Notes what is asked of a rank, and when. An update of the path "open" leaves the weights incomplete."""

    leader: Leader
    blocked: Blocked | None = None
    done: list[tuple[ControlOperation, int]] = field(default_factory=list)

    def run(self, op_id: str, op: ControlOperation) -> Outcome | None:
        assert self.leader.scheduler.steps.is_empty, "a step is in flight under weights that change"
        self.done.append((op, self.leader.num_agreements))
        if isinstance(op, UpdateWeightsFromDisk):
            self.blocked = INCOMPLETE if op.model_path == "open" else None
            return Outcome(True, "updated", None if self.blocked else op.weight_version)
        return Outcome(True, "done")


class ControlledGroup(DpGroup):
    """Leaders with fake operations; versions are recorded when a forward is launched."""

    def __init__(self, dp_size: int, num_pages: int = 60, **fields: Any) -> None:
        config = EngineConfig(
            model_path="",
            dp_size=dp_size,
            page_size=PAGE,
            max_running_requests=4,
            enable_return_routed_experts=True,
            **fields,
        )
        super().__init__(config, num_pages)
        self.operations = [FakeOperations(leader) for leader in self.leaders]
        # By dp rank and step: the version of the leader that launched it.
        self.launched: dict[tuple[int, int], str] = {}
        self.versions: dict[str, list[tuple[str, int, int]]] = {}
        for leader, operations in zip(self.leaders, self.operations, strict=True):
            leader.scheduler._controls._operations = operations
            self._watch(leader)
        self._watch_answers()

    def _watch(self, leader: Leader) -> None:
        launch = leader.runner.launch

        def watched(batch: ScheduleBatch) -> Any:
            scheduler = leader.scheduler
            if batch.num_tokens:
                assert not scheduler._controls._is_paused, "a step while paused"
                assert scheduler._controls.blocked is None, "a step with weights that are not whole"
            self.launched[leader.dp_rank, batch.step] = scheduler.recorder.weight_version
            return launch(batch)

        leader.runner.launch = watched  # type: ignore[method-assign]

    def _watch_answers(self) -> None:
        send = self.frontend.send

        def watched(batch: Any, frames: list[memoryview]) -> None:
            for output in batch.outputs:
                if output.routed_experts is not None:
                    self.versions.setdefault(output.rid, []).extend(output.routed_experts.weight_versions)
            send(batch, frames)

        self.frontend.send = watched  # type: ignore[method-assign]

    def expected_versions(self, rid: str) -> list[str]:
        """By position, the version under which its row was first computed."""
        answer = self.frontend.answers[rid]
        routed = self.leaders[answer.dp_rank].runner.first_routed.get(rid, {})
        return [self.launched[routed[position][:2]] for position in range(len(answer.routed))]

    def shipped_versions(self, rid: str) -> list[str]:
        return [version for version, start, end in self.versions.get(rid, []) for _ in range(start, end)]

    def control(self, op_id: str, operation: ControlOperation) -> None:
        self.frontend.link.send_to_all(lambda number: ControlReq(number, op_id, operation))

    def pause(self, op_id: str, mode: str) -> None:
        self.control(op_id, PauseGeneration(mode))

    def go_on(self, op_id: str) -> None:
        self.control(op_id, ContinueGeneration())

    def update(self, op_id: str, version: str, path: str = "whole", *, flush: bool = False) -> None:
        self.control(op_id, UpdateWeightsFromDisk(path, flush_cache=flush, weight_version=version))

    def check_answers(self) -> None:
        for rid, answer in self.frontend.answers.items():
            assert answer.reason is not None, f"{rid} was not answered"
            assert answer.error is None
            assert np.array_equal(answer.routed, self.expected_rows(rid)), f"{rid}: rows of another forward"
            assert self.shipped_versions(rid) == self.expected_versions(rid), f"{rid}: versions of another forward"

    def check_same_steps(self) -> None:
        first = self.operations[0].done
        assert all(operations.done == first for operations in self.operations), "not at one step on all leaders"


actions = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(0, 1), st.integers(1, 12), st.integers(1, 12)),
        st.tuples(st.just("pause"), st.sampled_from(["abort", "retract", "in_place"])),
        st.tuples(st.sampled_from(["continue", "abort", "flush"])),
        st.tuples(st.just("update"), st.sampled_from(["whole", "whole", "open"]), st.booleans()),
        st.tuples(st.just("move"), st.integers(0, 1), st.integers(1, 6)),
        st.tuples(st.just("arrive"), st.integers(0, 1), st.integers(1, 3)),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(actions, st.integers(1, 2), st.integers(0, 1), st.sampled_from([9, 60]))
def test_any_order_of_operations(history: list[tuple[Any, ...]], dp_size: int, depth: int, num_pages: int) -> None:
    """With a pool of 9 pages requests retract each other all the time."""
    group = ControlledGroup(dp_size, num_pages, overlap_depth=depth)
    expected = set()
    for number, (kind, *arguments) in enumerate(history):
        op_id = f"{kind}-{number}"
        if kind == "submit":
            dp_rank, length, new = arguments
            prompt = [(number * 7 + i) % 5 + 1 for i in range(min(length, PAGE * num_pages - new - 2, 12))]
            group.frontend.submit(dp_rank % dp_size, f"r{number}", prompt, max_new_tokens=min(new, 5), ignore_eos=True)
        elif kind == "move":
            for _ in range(arguments[1]):
                group.leaders[arguments[0] % dp_size].turn()
        elif kind == "arrive":
            group.leaders[arguments[0] % dp_size].wire.arrive(arguments[1])
        elif kind == "abort":
            group.frontend.abort(abort_all=True)
        else:
            expected.add(op_id)
            if kind == "pause":
                group.pause(op_id, arguments[0])
            elif kind == "continue":
                group.go_on(op_id)
            elif kind == "flush":
                group.frontend.flush(op_id)
            else:
                group.update(op_id, f"v{number}", arguments[0], flush=arguments[1])
    group.run_until_rest()
    # However it stands, one complete update and a word to go on let everybody finish.
    group.update("last update", "last")
    group.go_on("last word")
    group.run_until_rest()
    replies = group.replies()
    assert replies.keys() == expected | {"last update", "last word"}
    assert replies["last word"].success
    group.check_same_steps()
    group.check_answers()
    group.check_records()
    for leader in group.leaders:
        leader.pages.check_integrity()


@pytest.mark.parametrize("dp_size", [1, 2])
@pytest.mark.parametrize("mode", ["in_place", "retract", "abort"])
def test_a_paused_engine_sleeps(dp_size: int, mode: str) -> None:
    """And does not spin: no step, no agreement, until somebody says something; requests that come meanwhile are kept."""
    group = ControlledGroup(dp_size)
    group.frontend.submit(0, "running", [1, 2, 3], max_new_tokens=20, ignore_eos=True)
    for leader in group.leaders:
        leader.wire.arrive(9)
    for _ in range(6 * dp_size):
        for leader in group.leaders:
            leader.turn()
    group.pause("pause", mode)
    group.run_until_rest()
    group.frontend.submit(dp_size - 1, "waiting", [4, 5], max_new_tokens=3, ignore_eos=True)
    group.run_until_rest()
    agreements = [leader.num_agreements for leader in group.leaders]
    launched = dict(group.launched)
    for _ in range(50):
        assert not any(leader.turn() for leader in group.leaders)
    assert [leader.num_agreements for leader in group.leaders] == agreements and group.launched == launched
    reason = group.frontend.answers["running"].reason
    assert (reason is not None and reason.type == "abort") == (mode == "abort")
    assert group.frontend.answers["waiting"].reason is None
    group.go_on("go")
    group.run_until_rest()
    group.check_answers()
    retracted = sum(leader.scheduler.state()["num_retractions"] for leader in group.leaders)
    assert retracted == (1 if mode == "retract" else 0)


@pytest.mark.parametrize("dp_size", [1, 2])
@pytest.mark.parametrize("depth", [0, 1])
def test_a_pause_that_retracts_lets_the_cache_be_flushed(dp_size: int, depth: int) -> None:
    """Pause, flush, new weights, go on: what waits holds no pages, and its rows from before answer for it."""
    group = ControlledGroup(dp_size, overlap_depth=depth)
    rids = [f"{dp_rank}-{number}" for dp_rank in range(dp_size) for number in range(3)]
    for rid in rids:
        group.frontend.submit(int(rid[0]), rid, [1, 2, 3, int(rid[2])], max_new_tokens=12, ignore_eos=True)
    for leader in group.leaders:
        leader.wire.arrive(99)
    for _ in range(8):
        for leader in group.leaders:
            leader.turn()
    group.pause("pause", "retract")
    group.frontend.submit(0, "late", [1, 2, 3, 9], max_new_tokens=3, ignore_eos=True)
    group.frontend.flush("flush")
    group.run_until_rest()
    assert group.replies()["flush"].success
    assert group.replies()["pause"].message == f"paused: {len(rids) + 1} requests are kept"
    for leader in group.leaders:
        assert leader.pages.pool.num_free == 60 and leader.scheduler.queues.num_waiting >= 3
    group.update("update", "v1", flush=True)
    group.go_on("go")
    group.run_until_rest()
    assert group.replies()["update"].success
    group.check_same_steps()
    group.check_answers()
    for rid in rids:
        versions = group.shipped_versions(rid)
        assert set(versions) == {"default", "v1"} and versions == sorted(versions)
    assert set(group.shipped_versions("late")) == {"v1"}


@pytest.mark.parametrize("mode", ["in_place", "retract", "abort"])
def test_a_pause_counts_the_requests_of_all_ranks(mode: str) -> None:
    group = ControlledGroup(3)
    for dp_rank, count in enumerate((0, 1, 6)):
        for number in range(count):
            group.frontend.submit(dp_rank, f"{dp_rank}-{number}", [1, 2], max_new_tokens=9, ignore_eos=True)
    group.pause("pause", mode)
    group.go_on("go")
    # Both arrive at once: the answers come in their order all the same.
    group.run_until_rest()
    assert group.replies()["pause"].message == f"paused: {0 if mode == 'abort' else 7} requests are kept"
    assert list(group.replies()) == ["pause", "go"]


@pytest.mark.parametrize("dp_size", [1, 2])
def test_what_flushes_is_refused_while_anybody_runs(dp_size: int) -> None:
    group = ControlledGroup(dp_size)
    group.frontend.submit(dp_size - 1, "running", [1, 2, 3], max_new_tokens=20, ignore_eos=True)
    group.pause("in place", "in_place")
    group.run_until_rest()
    group.go_on("go")
    for leader in group.leaders:
        leader.wire.arrive(9)
    for _ in range(8):
        for leader in group.leaders:
            leader.turn()
    group.pause("again", "in_place")
    group.update("flushing", "v1", flush=True)
    group.frontend.flush("flush")
    group.control("release", ReleaseMemoryOccupation(["weights"]))
    group.control("receive", UpdateWeightsFromDistributed(["a"], ["float32"], [[1]]))
    group.run_until_rest()
    replies = group.replies()
    assert "flush_cache: must be false while requests run" in replies["flushing"].message
    assert "not flushed: 1 requests run" in replies["flush"].message
    assert "memory is released only when nothing runs or waits" in replies["release"].message
    assert not any(replies[op].success for op in ("flushing", "flush", "release", "receive"))
    # Of a refused bucket nothing is received; but its sender's group is left, on all ranks.
    for operations in group.operations:
        assert [type(op) for op, _ in operations.done] == [DestroyWeightsUpdateGroup]
    group.update("keeping", "v2", flush=False)
    group.go_on("go on")
    group.run_until_rest()
    assert group.replies()["keeping"].success
    group.check_answers()
    assert set(group.shipped_versions("running")) == {"default", "v2"}


def test_nobody_goes_on_with_weights_that_are_not_whole() -> None:
    group = ControlledGroup(2)
    group.update("open", "v1", "open")
    group.frontend.submit(1, "waiting", [1, 2], max_new_tokens=3, ignore_eos=True)
    group.go_on("too early")
    group.run_until_rest()
    replies = group.replies()
    assert replies["open"].success and replies["open"].blocked == INCOMPLETE
    assert not replies["too early"].success and "not complete" in replies["too early"].message
    assert not group.launched
    group.update("rest", "v1")
    group.run_until_rest()
    assert group.replies()["rest"].blocked is None
    assert group.shipped_versions("waiting") == ["v1"] * 4
    group.check_answers()
