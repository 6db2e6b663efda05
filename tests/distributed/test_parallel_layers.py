"""Sharded layers and collectives on real gloo ranks. One start of processes serves many checks."""

from __future__ import annotations

import pytest
from distributed.rank_checks import check_eight_ranks, check_four_ranks, check_two_ranks, fail_on_rank_one
from distributed.ranks import run_ranks
from torch.multiprocessing import ProcessRaisedException


def test_two_ranks_compute_what_one_does() -> None:
    run_ranks(check_two_ranks, 2)


@pytest.mark.matrix
def test_four_ranks_compute_what_one_does() -> None:
    run_ranks(check_four_ranks, 4)


@pytest.mark.matrix
def test_eight_ranks_compute_what_one_does() -> None:
    run_ranks(check_eight_ranks, 8, timeout_s=240.0)


def test_a_failing_rank_is_reported_and_ends_the_others() -> None:
    with pytest.raises(ProcessRaisedException, match=r"Process 1 terminated(.|\n)*the reason"):
        run_ranks(fail_on_rank_one, 2)
