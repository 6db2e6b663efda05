"""What follows from proposals: pure decisions, the same on all leaders."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waybill.engine.scheduler.agreement import Agreement, ForwardMode, Proposal, SingleRankSync, from_rows, to_row
from waybill.parallel.dp_attention import rows_per_rank

NUMBERS = st.integers(0, 20)
PROPOSALS = st.builds(
    Proposal,
    num_tokens=st.integers(0, 50),
    mode=st.sampled_from(ForwardMode),
    num_reqs=st.integers(0, 3),
    is_pending=st.integers(0, 1),
    seen=NUMBERS,
    applied=NUMBERS,
    cause_ns=st.integers(0, 2**62),
)


@given(st.lists(PROPOSALS, min_size=1, max_size=5))
def test_rows_of_integers_carry_everything(proposals: list[Proposal]) -> None:
    rows = [to_row(proposal) for proposal in proposals]
    assert all(isinstance(value, int) and -(2**63) <= value < 2**63 for row in rows for value in row)
    assert from_rows(rows) == Agreement(tuple(proposals))


@given(st.lists(PROPOSALS, min_size=1, max_size=5), st.integers(1, 3))
def test_every_rank_holds_as_many_rows_as_the_largest_share(proposals: list[Proposal], tp_size: int) -> None:
    rows = Agreement(tuple(proposals)).rows_per_rank(tp_size)
    tokens = [proposal.num_tokens for proposal in proposals]
    assert all(rows * tp_size >= num for num in tokens)
    assert rows == 0 or any((rows - 1) * tp_size < num for num in tokens), "a row more than anybody needs"
    assert rows == rows_per_rank(tokens, tp_size)
    assert (rows == 0) == (Agreement(tuple(proposals)).num_tokens == 0)


@pytest.mark.parametrize(
    ("changes", "sleeps"),
    [
        ({}, True),
        ({"is_pending": 1}, False),
        # A paused engine keeps its requests, and sleeps.
        ({"num_reqs": 1, "num_running": 1}, True),
        ({"seen": 4}, False),
        ({"seen": 4, "applied": 4}, False),
        ({"applied": 2}, False),
        # One that is behind: it will get the number that the others have.
        ({"seen": 2, "applied": 2}, False),
    ],
)
@pytest.mark.parametrize("who", [0, 1, 2])
def test_ranks_sleep_when_nobody_has_work_and_all_know_the_same(
    changes: dict[str, int], sleeps: bool, who: int
) -> None:
    at_rest = {"num_reqs": 0, "is_pending": 0, "seen": 3, "applied": 3}
    proposals = [Proposal(**(at_rest | (changes if rank == who else {}))) for rank in range(3)]
    assert Agreement(tuple(proposals)).may_sleep == sleeps


@pytest.mark.parametrize(
    ("seen", "applied", "number", "plain", "asking"),
    [
        ((3, 3), (2, 2), 3, True, True),
        ((3, 2), (2, 2), 3, False, False),
        ((3, 3), (2, 1), 3, True, False),
        ((4, 3), (2, 2), 4, False, False),
        ((9, 9), (2, 2), 3, True, True),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_an_operation_is_allowed_once_every_leader_has_it(
    seen: tuple[int, int], applied: tuple[int, int], number: int, plain: bool, asking: bool, swapped: bool
) -> None:
    proposals = [Proposal(seen=s, applied=a) for s, a in zip(seen, applied, strict=True)]
    agreement = Agreement(tuple(reversed(proposals) if swapped else proposals))
    assert agreement.allows(number, asks_for_idle=False) == plain
    assert agreement.allows(number, asks_for_idle=True) == asking


def test_a_leader_alone_agrees_with_itself() -> None:
    proposal = Proposal(num_tokens=5, num_reqs=1, seen=3, applied=3)
    assert SingleRankSync().agree(proposal) == Agreement((proposal,))
