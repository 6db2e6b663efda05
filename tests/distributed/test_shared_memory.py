"""Collectives through shared memory on real ranks, beside gloo's."""

from __future__ import annotations

import pytest
from distributed.ranks import run_ranks
from distributed.shared_memory_checks import check_no_shared_memory, check_shared_memory


def test_collectives_of_two_ranks_are_those_of_gloo() -> None:
    run_ranks(check_shared_memory, 2)


@pytest.mark.matrix
def test_collectives_of_four_ranks_are_those_of_gloo() -> None:
    run_ranks(check_shared_memory, 4)


@pytest.mark.matrix
def test_a_rank_that_cannot_share_memory_leaves_all_to_gloo() -> None:
    run_ranks(check_no_shared_memory, 2)
