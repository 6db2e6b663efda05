"""Where the tensors of an update come from."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from safetensors import SafetensorError

from ...parallel.weights import ShardedWeight
from ..models.checkpoint import Checkpoint
from ..models.weight_loader import Changes, load_weights
from .manifest import TensorSpec
from .update_group import UpdateGroup

# A bucket up to this size waits in memory until every rank has it whole.
MAX_STAGED_BYTES = 2 << 30
TRANSFER_ERRORS = (RuntimeError, OSError, SafetensorError)

# Tells the other ranks why this one lacks the bucket (None: it has it); why the bucket must not be used, None if it may.
AllHaveIt = Callable[[str | None], str | None]


@dataclass(frozen=True)
class Target:
    """Weights by the names under which they may come, those that may come in vain, and whether they have been changed."""

    weights: Mapping[str, ShardedWeight]
    ignored: Container[str]
    changes: Changes


class Transfer(Protocol):
    def load(self, target: Target, all_have_it: AllHaveIt) -> None:
        """Put every tensor in place.

        Raises:
            ValueError, RuntimeError, OSError, SafetensorError: it broke off, here or on another rank; the target says
                whether weights were changed.
        """
        ...


@dataclass(frozen=True)
class FileTransfer:
    """From safetensors files that every rank reads by itself."""

    checkpoint: Checkpoint
    device: torch.device

    def load(self, target: Target, all_have_it: AllHaveIt) -> None:
        load_weights(target.weights, self.checkpoint, target.ignored, self.device, target.changes)


@dataclass(frozen=True)
class BroadcastTransfer:
    """From the trainer: one broadcast a tensor, or (`in_one`) all in one."""

    group: UpdateGroup
    specs: Sequence[TensorSpec]
    in_one: bool

    def load(self, target: Target, all_have_it: AllHaveIt) -> None:
        for name, source in self._tensors(all_have_it):
            if name not in target.ignored:
                target.changes.any = True
                target.weights[name].load(source)

    def _tensors(self, all_have_it: AllHaveIt) -> Iterator[tuple[str, torch.Tensor]]:
        if not self.in_one and sum(spec.num_bytes for spec in self.specs) > MAX_STAGED_BYTES:
            for spec in self.specs:
                yield spec.name, self.group.receive(spec)
            return
        staged: list[torch.Tensor] = []
        error = None
        try:
            staged = self.group.receive_bucket(self.specs) if self.in_one else [*map(self.group.receive, self.specs)]
        except TRANSFER_ERRORS as problem:
            error = str(problem)
        refusal = all_have_it(error)
        if refusal is not None:
            raise RuntimeError(refusal)
        for spec, tensor in zip(self.specs, staged, strict=True):
            yield spec.name, tensor
