"""The trainer's side of a step: batches of rollouts, GRPO's loss, and how far trainer and engine are apart.

GRPO: Shao et al. 2024 (DeepSeekMath), one advantage a turn; the clipped ratio of Schulman et al. 2017 (PPO), averaged
over tokens. The behaviour policy is the engine, whose log-probabilities are the denominator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rollouts import Rollout

from waybill.engine.routing.replay import RoutedExpertsBatch

EXTREME_RATIO = 2.0


@dataclass(frozen=True)
class PolicyBatch:
    """B rollouts, padded on the right to S tokens. `sampled`, `old` and `advantages` [B, S - 1] belong to the token that
    each position predicts."""

    tokens: torch.Tensor  # [B, S]
    mask: torch.Tensor  # [B, S]
    sampled: torch.Tensor  # bool
    old: torch.Tensor  # the engine's log-probabilities
    advantages: torch.Tensor
    routes: RoutedExpertsBatch


def group_advantages(rollouts: Sequence[Rollout]) -> torch.Tensor:
    """[rollouts, turns]: each turn's reward against those of its group in the same turn, (r - mean) / (std + 1e-4), among
    the rollouts that were right so far. What builds on a wrong answer is wrong whatever it says: 0."""
    rewards = torch.tensor([rollout.rewards for rollout in rollouts], dtype=torch.float32)
    groups = torch.tensor([rollout.group for rollout in rollouts])
    right_so_far = torch.ones_like(rewards, dtype=torch.bool)
    right_so_far[:, 1:] = rewards[:, :-1].cumprod(dim=1) == 1
    advantages = torch.zeros_like(rewards)
    for group in groups.unique():
        for turn in range(rewards.shape[1]):
            members = (groups == group) & right_so_far[:, turn]
            if members.any():
                own = rewards[members, turn]
                advantages[members, turn] = (own - own.mean()) / (own.std(correction=0) + 1e-4)
    return advantages


def make_batch(rollouts: Sequence[Rollout], advantages: torch.Tensor, pad: int) -> PolicyBatch:
    """`advantages` are [B, turns]."""
    width = max(len(rollout.tokens) for rollout in rollouts)

    def padded(values: Sequence[float], filler: float) -> list[float]:
        return [*values, *[filler] * (width - len(values))]

    mask = torch.tensor([padded([1] * len(rollout.tokens), 0) for rollout in rollouts])
    turns = torch.tensor([padded(rollout.turn_of, -1) for rollout in rollouts])[:, 1:]
    routes = [[delta.decode() for delta in rollout.deltas] for rollout in rollouts]
    return PolicyBatch(
        tokens=torch.tensor([padded(rollout.tokens, pad) for rollout in rollouts]),
        mask=mask,
        sampled=turns >= 0,
        old=torch.tensor([padded(rollout.logprobs, 0.0) for rollout in rollouts], dtype=torch.float32)[:, 1:],
        advantages=advantages.gather(1, turns.clamp(min=0)),
        routes=RoutedExpertsBatch.from_padded(routes, mask),
    )


def log_ratios(model: Any, batch: PolicyBatch, *, replay: bool) -> torch.Tensor:
    """log p_trainer - log p_engine of every predicted token, [B, S - 1]; zero where none was sampled."""
    more = {"routed_experts": batch.routes if replay else None}
    logits = model(batch.tokens, attention_mask=batch.mask, use_cache=False, **more).logits
    logprobs = torch.log_softmax(logits[:, :-1].float(), dim=-1).gather(2, batch.tokens[:, 1:, None])[..., 0]
    return torch.where(batch.sampled, logprobs - batch.old, 0.0)


def grpo_loss(ratios_log: torch.Tensor, batch: PolicyBatch, clip: float, num_tokens: float) -> torch.Tensor:
    """Summed over this batch's sampled tokens, divided by `num_tokens` of the whole optimizer step."""
    ratios = ratios_log.exp()
    gain = torch.minimum(ratios * batch.advantages, ratios.clamp(1 - clip, 1 + clip) * batch.advantages)
    return -(gain * batch.sampled).sum() / num_tokens


@dataclass
class Mismatch:
    """Sums over sampled tokens. KL(engine || trainer) by the unbiased estimator r - 1 - log r of low variance (Schulman
    2020)."""

    kl: float = 0.0
    extreme: float = 0.0
    tokens: float = 0.0

    def add(self, ratios_log: torch.Tensor, sampled: torch.Tensor) -> None:
        values = ratios_log.detach()[sampled].double()
        self.kl += float((values.exp() - 1 - values).sum())
        self.extreme += float((values.abs() > torch.tensor(EXTREME_RATIO).log()).sum())
        self.tokens += len(values)

    def as_tensor(self) -> torch.Tensor:
        return torch.tensor([self.kl, self.extreme, self.tokens], dtype=torch.float64)
