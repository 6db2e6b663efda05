"""Which dp rank gets a request."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from waybill.engine.dp_router import DpRouter


def test_requests_go_to_the_rank_with_the_least_to_do() -> None:
    router = DpRouter(3)
    assert [router.choose() for _ in range(4)] == [0, 1, 2, 0]
    router.release(1)
    assert router.choose() == 1


@given(st.lists(st.sampled_from(["a", "b", "c", None]), max_size=40))
def test_a_session_stays_on_its_rank(sessions: list[str | None]) -> None:
    router = DpRouter(4)
    homes: dict[str, int] = {}
    for session in sessions:
        rank = router.choose(session)
        if session is not None:
            assert homes.setdefault(session, rank) == rank


def test_a_named_rank_wins_and_becomes_the_sessions() -> None:
    router = DpRouter(4)
    assert router.choose("s") == 0
    assert router.choose("s", routed_dp_rank=2) == 2
    assert router.choose("s") == 2
