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
class Bucket:
    """What comes in one broadcast: one tensor, or (`is_flat`) the bytes of several, one behind the other."""

    specs: Sequence[TensorSpec]
    is_flat: bool = False

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.specs)


def packed(specs: Sequence[TensorSpec], num_bytes: int) -> list[Bucket]:
    """Flat buckets as vLLM's trainers make them: each ends with the tensor that brings it over `num_bytes`."""
    buckets: list[Bucket] = []
    held: list[TensorSpec] = []
    num_held = 0
    for spec in specs:
        held.append(spec)
        num_held += spec.num_bytes
        if num_held > num_bytes:
            buckets.append(Bucket(held, is_flat=True))
            held, num_held = [], 0
    return [*buckets, Bucket(held, is_flat=True)] if held else buckets


@dataclass(frozen=True)
class BroadcastTransfer:
    """From the trainer, in these buckets."""

    group: UpdateGroup
    buckets: Sequence[Bucket]

    def load(self, target: Target, all_have_it: AllHaveIt) -> None:
        for name, source in self._tensors(all_have_it):
            if name not in target.ignored:
                target.changes.any = True
                target.weights[name].load(source)

    def _tensors(self, all_have_it: AllHaveIt) -> Iterator[tuple[str, torch.Tensor]]:
        if len(self.buckets) > 1 and sum(bucket.num_bytes for bucket in self.buckets) > MAX_STAGED_BYTES:
            for bucket in self.buckets:
                yield from zip((spec.name for spec in bucket.specs), self._receive(bucket), strict=True)
            return
        staged: list[tuple[str, torch.Tensor]] = []
        error = None
        try:
            for bucket in self.buckets:
                staged += zip((spec.name for spec in bucket.specs), self._receive(bucket), strict=True)
        except TRANSFER_ERRORS as problem:
            error = str(problem)
        refusal = all_have_it(error)
        if refusal is not None:
            raise RuntimeError(refusal)
        yield from staged

    def _receive(self, bucket: Bucket) -> Sequence[torch.Tensor]:
        if bucket.is_flat:
            return self.group.receive_bucket(bucket.specs)
        return [*map(self.group.receive, bucket.specs)]
