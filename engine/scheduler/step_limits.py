"""Who runs in this step: pure budgets, no request objects, no tensors.

A step decodes every running request (one token each) and spends a separate budget of prompt tokens on prefills, oldest
first, so that a long prompt delays a decode by one chunk at most (chunked prefill, Sarathi-Serve, Agrawal et al. 2024).

`chunked_prefill_size` and `max_running_requests` set the two bounds, as in sglang (vLLM: max_num_batched_tokens,
max_num_seqs).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepLimits:
    """Bounds of every step. `prefill_tokens` is also the longest chunk; with `split` off a prompt runs in one piece."""

    prefill_tokens: int
    split: bool
    max_running: int

    @property
    def max_tokens(self) -> int:
        """Most rows that a step can have: the prefill budget and one token of every running request."""
        return self.prefill_tokens + self.max_running

    @staticmethod
    def resolve(chunked_prefill_size: int, context_length: int, max_running: int) -> StepLimits:
        """A chunk size of -1 means no chunks: the budget is then the longest prompt there can be."""
        split = chunked_prefill_size != -1
        return StepLimits(chunked_prefill_size if split else context_length, split, max_running)


@dataclass
class PrefillBudget:
    """What is left of a step's prefill tokens."""

    limits: StepLimits
    used: int = 0

    def grant(self, num_remaining: int) -> int:
        """Tokens that a prefill with `num_remaining` to go may run in this step; 0 if it has to wait."""
        assert num_remaining > 0
        left = self.limits.prefill_tokens - self.used
        if num_remaining > left and not self.limits.split:
            return 0
        return min(num_remaining, left)

    def spend(self, num_tokens: int) -> None:
        self.used += num_tokens
        assert self.used <= self.limits.prefill_tokens


def admission_fits(num_pages_needed: int, num_pages_available: int, num_running: int) -> bool:
    """Whether a new request may take pages: one page per running request stays in reserve for its next tokens, so that
    an admission is not paid for by a retraction in the next steps. An idle engine always tries."""
    reserve = num_running
    return num_running == 0 or num_pages_needed + reserve <= num_pages_available
