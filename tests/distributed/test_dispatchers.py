"""Tokens scattered over dp and tp ranks, through every dispatcher, on real gloo ranks."""

from __future__ import annotations

import pytest
from distributed.dispatch_checks import check_dispatchers
from distributed.ranks import run_ranks


def test_dp_2_tp_1() -> None:
    run_ranks(check_dispatchers, 2, 2, 1)


@pytest.mark.matrix
def test_dp_2_tp_2() -> None:
    run_ranks(check_dispatchers, 4, 2, 2, timeout_s=240.0)
