"""The loss of the example loop: whose rewards are compared, and what a ratio of probabilities is worth."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "examples" / "grpo"))

from policy import group_advantages
from rollouts import Rollout


def rollout(group: int, *rewards: float) -> Rollout:
    return Rollout(group, [], [], [], [], list(rewards), [])


def test_a_turn_is_compared_with_those_of_its_group_that_were_right_so_far() -> None:
    rollouts = [
        rollout(0, 1, 1),
        rollout(0, 1, 0),
        rollout(0, 0, 0),
        rollout(0, 0, 0),
        rollout(1, 0, 0),
        rollout(1, 0, 0),
    ]
    advantages = group_advantages(rollouts)
    assert advantages[:4, 0].tolist() == pytest.approx([1, 1, -1, -1], abs=1e-3)
    assert advantages[:, 1].tolist() == pytest.approx([1, -1, 0, 0, 0, 0], abs=1e-3)
    # Where all did alike nothing is learnt.
    assert torch.equal(advantages[4:], torch.zeros(2, 2))


def test_one_rollout_that_was_right_so_far_has_nobody_to_be_compared_with() -> None:
    advantages = group_advantages([rollout(0, 1, 1), rollout(0, 0, 0)])
    assert advantages[:, 1].tolist() == [0, 0]
