"""Replay under DeepSpeed on two gloo ranks. One start of processes serves all checks."""

from __future__ import annotations

from distributed.ranks import run_ranks
from distributed.replay_rank_checks import WORLD, check_deepspeed


def test_training_under_deepspeed_equals_one_process() -> None:
    """Received ids, gradients and weights under ZeRO-1, 2 and 3, with and without activation checkpointing; and DeepSpeed's
    own router in place of the stock one."""
    run_ranks(check_deepspeed, WORLD)
