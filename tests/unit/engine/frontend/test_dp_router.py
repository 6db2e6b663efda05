"""Which dp rank gets a request."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from waybill.engine.frontend import dp_router
from waybill.engine.frontend.dp_router import BLOCK_TOKENS, MAX_IMBALANCE, DpRouter

SHORT = b""


def prompt(*families: int) -> bytes:
    """A block of tokens for each family, and a rest that fills none."""
    return np.repeat(np.array([*families, 9], dtype="<i4"), BLOCK_TOKENS).tobytes()[:-4]


def test_requests_go_to_the_rank_with_the_least_to_do() -> None:
    router = DpRouter(3)
    assert [router.choose(SHORT) for _ in range(4)] == [0, 1, 2, 0]
    router.release(1)
    assert router.choose(SHORT) == 1


def test_samples_of_a_prompt_stay_together_and_weigh_what_they_are() -> None:
    router = DpRouter(2)
    assert router.choose(SHORT, num_samples=3) == 0
    assert [router.choose(SHORT) for _ in range(3)] == [1, 1, 1]
    assert router.load == [3, 3]


@given(st.lists(st.sampled_from(["a", "b", "c", None]), max_size=40))
def test_a_session_stays_on_its_rank(sessions: list[str | None]) -> None:
    router = DpRouter(4)
    homes: dict[str, int] = {}
    for session in sessions:
        rank = router.choose(SHORT, session_id=session)
        if session is not None:
            assert homes.setdefault(session, rank) == rank


def test_what_is_remembered_of_clients_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions and prompts are the clients' choice: those used longest ago are forgotten."""
    monkeypatch.setattr(dp_router, "MAX_SESSIONS", 10)
    monkeypatch.setattr(dp_router, "MAX_BLOCKS", 20)
    router = DpRouter(2)
    for number in range(1000):
        router.release(router.choose(prompt(number, number), f"tenant {number}", session_id=f"session {number}" * 30))
    assert len(router._sessions) == 10 and len(router._prefixes._ranks) == 20
    assert all(len(key) == dp_router.DIGEST_BYTES for key in (*router._sessions, *router._prefixes._ranks))


def test_a_named_rank_wins_and_becomes_the_sessions() -> None:
    router = DpRouter(4)
    assert router.choose(SHORT, session_id="s") == 0
    assert router.choose(SHORT, session_id="s", routed_dp_rank=2) == 2
    assert router.choose(SHORT, session_id="s") == 2


def test_the_longest_prefix_draws_a_request() -> None:
    router = DpRouter(3)
    assert router.choose(prompt(1, 2)) == 0
    assert router.choose(prompt(1, 3), routed_dp_rank=1) == 1
    assert router.choose(prompt(1, 3, 4)) == 1
    # Two ranks hold the first block: the one with less to do.
    router.release(0)
    assert router.choose(prompt(1, 5)) == 0
    # What another tenant has cached is not this one's.
    assert router.choose(prompt(1, 2), "tenant") == 2


def test_a_session_weighs_more_than_a_prefix() -> None:
    router = DpRouter(2)
    assert router.choose(prompt(1), session_id="s") == 0
    assert router.choose(prompt(2), routed_dp_rank=1) == 1
    assert router.choose(prompt(2), session_id="s") == 0


@pytest.mark.parametrize("flushed", [False, True])
def test_a_prefix_does_not_draw_to_a_rank_that_is_far_busier_nor_after_a_flush(flushed: bool) -> None:
    router = DpRouter(2)
    if flushed:
        router.choose(prompt(1))
        router.forget_prefixes()
        assert router.choose(prompt(1)) == 1
        return
    assert [router.choose(prompt(1)) for _ in range(MAX_IMBALANCE + 2)] == [0] * (MAX_IMBALANCE + 1) + [1]
