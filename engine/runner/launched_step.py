"""A step that is on the device, and what of it is on its way to the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..grammar.constraint import Constraint
from ..plan import GraphChoice, PromptScores
from .sampler import Sampled

# Why a request cannot go on.
NO_CHOICE = (
    "no token can be chosen: the model's scores are not finite numbers (weights with NaN or infinite values do that), or "
    "every token is banned"
)


class HostCopy:
    """Tensors on their way to the host: asked for at launch, so that nothing launched later delays them.

    `are_finite` [n] bool is about the requests of the step that do not sample. `constraints` are those of the requests that
    do, by their place among them.
    """

    def __init__(
        self,
        sampled: Sampled | None,
        are_finite: torch.Tensor | None,
        device: torch.device,
        constraints: dict[int, Constraint] | None = None,
    ) -> None:
        self.constraints = constraints or {}
        self.outcomes = None if sampled is None else self._start(sampled.outcomes)
        self.logprobs = None if sampled is None or sampled.logprobs is None else self._start(sampled.logprobs)
        top = [] if sampled is None else sampled.top
        self.top = [None if pair is None else (self._start(pair[0]), self._start(pair[1])) for pair in top]
        self.are_finite = None if are_finite is None else self._start(are_finite)
        self._done: torch.cuda.Event | None = None
        if device.type != "cpu":
            self._done = torch.cuda.Event()
            self._done.record()

    @staticmethod
    def _start(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "cpu":
            return tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

    @property
    def is_done(self) -> bool:
        return self._done is None or self._done.query()

    def wait(self) -> None:
        if self._done is not None:
            self._done.synchronize()

    def why_none(self, place: int) -> str:
        """Why the request at that place among those that sample has no token."""
        constraint = self.constraints.get(place)
        return NO_CHOICE if constraint is None or not constraint.failure else constraint.failure


@dataclass(frozen=True)
class LaunchedStep:
    """A step whose kernels are enqueued; on the leader with everything that its result is made from."""

    sampled: HostCopy | None
    sampling: list[int]  # indices in the batch of the requests that sample
    not_sampling: list[int]
    prompt_scores: dict[int, PromptScores]
    ring_seq: int
    graph: GraphChoice | None  # what it is a replay of
