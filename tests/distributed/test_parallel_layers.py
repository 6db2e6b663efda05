"""Sharded layers and collectives on real gloo ranks. One start of processes serves many checks."""

from __future__ import annotations

import time

import pytest
import torch.distributed as dist
from distributed.rank_checks import check_four_ranks, check_two_ranks
from distributed.ranks import run_ranks
from torch.multiprocessing import ProcessRaisedException


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("the reason")


def sleep_on_rank_one() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)


def test_two_ranks_compute_what_one_does() -> None:
    run_ranks(check_two_ranks, 2)


def test_four_ranks_compute_what_one_does() -> None:
    run_ranks(check_four_ranks, 4)
